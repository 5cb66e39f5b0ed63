"""A language model behind the queue: greedy answers of requests that wait together are generated together.

Each is the answer to its prompt alone. In a batch the products round otherwise, which can change a greedy token only
where two are nearly as likely; a row in which that happens leaves the batch, and its answer is generated alone, from
its prompt on. Sampled answers are generated alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from isotune.data.sources.source import surrogate_fault
from isotune.evaluation.generation.base_rules import without_base_rules
from isotune.evaluation.generation.chat import prompt_of
from isotune.evaluation.generation.completion import BATCH_SIZE, Decoding, complete_batch, prompt_tokens
from isotune.evaluation.generation.together import together
from isotune.evaluation.models import GenerationModel
from isotune.io.errors import UserError
from isotune.models.log_control import quiet_libraries
from isotune.serving.generation.answer_text import AnswerText
from isotune.serving.limits import BAD_REQUEST, FAILED, Refused, too_late
from isotune.serving.worker import Job

# Two scores that are closer than this share of the largest one are nearly the same: 10 times and more what batches
# were seen to change (tests/numerics/test_serving_answers.py), in fp32 and in the 16-bit types.
NEARLY = {torch.float32: 5e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class ToAnswer:
    """The tokens of one prompt and how to go on from it; the result is an Answer."""

    tokens: tuple[int, ...]
    decoding: Decoding
    text: AnswerText

    @property
    def is_chat(self) -> bool:
        """Whether the answer ends where another turn begins."""
        return self.text.prompt is not None


@dataclass(frozen=True)
class Answer:
    """What was generated: `finish` is STOP where the model or a stop word ended it, LENGTH at the token limit."""

    text: str
    finish: str
    prompt_tokens: int
    tokens: int


class GeneratorService:
    """What the worker does with prompts."""

    def __init__(self, lm: GenerationModel) -> None:
        self.lm = lm
        self.tokens = self.alone = 0  # tokens generated so far, and answers that left their batch
        self._nearly = NEARLY.get(lm.model.dtype, NEARLY[torch.bfloat16])

    def prepare_chat(
        self, messages: Sequence[dict[str, Any]], decoding: Decoding, stop: tuple[str, ...] = ()
    ) -> ToAnswer:
        """A conversation that asks for an answer, in the form of training; Refused where the template refuses it."""
        try:
            prompt = prompt_of(self.lm, messages)
        except UserError as error:
            raise Refused(BAD_REQUEST, "bad_messages", str(error), "messages") from error
        return self.prepare_prompt(prompt, "messages", decoding, stop, is_chat=True)

    def prepare_prompt(
        self, prompt: str, field: str, decoding: Decoding, stop: tuple[str, ...] = (), *, is_chat: bool
    ) -> ToAnswer:
        """A text to go on with, as it stands; Refused where it leaves the model no position, or has no token."""
        try:
            tokens = prompt_tokens(self.lm, prompt, f"the {field}")
        except UserError as error:
            code = "not_utf8" if surrogate_fault(prompt) else "context_length_exceeded"
            raise Refused(BAD_REQUEST, code, str(error), field) from error
        if not tokens:
            raise Refused(BAD_REQUEST, "empty_prompt", f"the {field} is of no token", field)
        return ToAnswer(tuple(tokens), decoding, AnswerText(self.lm, stop, prompt if is_chat else None))

    def group(self, waiting: Sequence[Job]) -> list[Job]:
        """The first job and further greedy ones of its kind; fewer where rows would change each other."""
        first = waiting[0].work
        if first.decoding.temperature > 0:
            return [waiting[0]]
        fitting = (job for job in waiting if job.work.decoding.temperature == 0 and job.work.is_chat == first.is_chat)
        chosen = [job for job, _ in zip(fitting, range(BATCH_SIZE), strict=False)]
        numbers = together(self.lm, [len(job.work.tokens) for job in chosen])
        return [job for job, number in zip(chosen, numbers, strict=True) if number == numbers[0]]

    def run(self, jobs: list[Job]) -> None:
        """Generate the answers of one batch, and then those that must be generated alone."""
        with quiet_libraries(), without_base_rules(self.lm.model):
            for job in self._generate(jobs):
                self.alone += 1
                self._generate([job])

    def _generate(self, jobs: list[Job]) -> list[Job]:
        """Generate answers together; returns the jobs that have none yet because the batch might decide it."""
        works = [job.work for job in jobs]
        for work in works:
            work.text.restart()
        limits = [work.decoding.max_new_tokens for work in works]
        batch = _Batch(jobs, self._nearly if len(jobs) > 1 else None)
        complete_batch(
            self.lm,
            [0] * len(jobs),  # of a sampled answer the number of its stream, as for one question
            [list(work.tokens) for work in works],
            replace(works[0].decoding, max_new_tokens=max(limits)),
            turns=works[0].is_chat,
            limits=limits,
            watcher=batch,
        )
        self.tokens += batch.tokens
        return batch.undecided


class _Batch:
    """Hands the tokens of a batch's rows on to their jobs, and finds the rows that the batch itself might decide."""

    def __init__(self, jobs: list[Job], nearly: float | None) -> None:
        self.jobs, self.nearly = jobs, nearly
        self.undecided = list[Job]()
        self._counts = [0] * len(jobs)
        self._stopped = [False] * len(jobs)
        self._close = [False] * len(jobs)

    @property
    def tokens(self) -> int:
        """The number of tokens that were handed on."""
        return sum(self._counts)

    def choose(self, scores: torch.Tensor) -> None:
        """Note the rows whose two best scores are nearly the same."""
        if bool(scores.isnan().any()):
            raise Refused(FAILED, "not_finite", "the model's scores are NaN: its weights are broken")
        if self.nearly is not None:
            scores = scores.float()
            best = scores.topk(2, dim=-1).values
            self._close = (best[:, 0] - best[:, 1] <= self.nearly * scores.abs().amax(-1)).tolist()

    def token(self, row: int, token: int) -> bool:
        """Hand on what the token makes certain; false where the row is not to go on."""
        job = self.jobs[row]
        if self._close[row] or not job.is_wanted:
            return False
        self._counts[row] += 1
        if job.on_piece is None and not job.work.text.stop:  # the text of all tokens is made once, at the end
            job.work.text.keep(token)
            return True
        piece, self._stopped[row] = job.work.text.add(token)
        if piece and job.on_piece is not None:
            job.on_piece(piece)
        return not self._stopped[row]

    def end(self, row: int, by_model: bool) -> None:
        """Answer the job of a row, unless it is undecided."""
        job = self.jobs[row]
        if not job.is_wanted:
            job.result.set_exception(too_late())
        elif self._close[row]:
            self.undecided.append(job)
        else:
            piece, whole = job.work.text.finish()
            if piece and job.on_piece is not None:
                job.on_piece(piece)
            finish = STOP if by_model or self._stopped[row] else LENGTH
            job.result.set_result(Answer(whole, finish, len(job.work.tokens), self._counts[row]))
