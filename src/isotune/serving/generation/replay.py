"""A language model's stored greedy answers made again: the same texts."""

import math

from isotune.evaluation.generation.completion import BATCH_SIZE, Decoding
from isotune.evaluation.tasks import EvalSamples, GenerationTask, read_task
from isotune.io.errors import UserError
from isotune.serving.generation.service import GeneratorService
from isotune.serving.replay import Evaluated, Replayed, spread
from isotune.serving.worker import Job


def why_not(evaluated: Evaluated) -> str | None:
    """Why a result cannot be compared with what is served; None where it can."""
    temperature = evaluated.result.facts["decoding"]["temperature"]
    return None if temperature == 0 else f"its answers were sampled at temperature {temperature:g}"


def samples_of(evaluated: Evaluated) -> EvalSamples:
    """The questions of an evaluation; UserError where the data are others now."""
    try:
        task = read_task(GenerationTask, None, evaluated.task_keys(GenerationTask) | {"allow_dropped": True})
        samples = task.samples(evaluated.claim.get("limit"))
    except UserError as error:
        raise evaluated.no_rows(str(error)) from error
    if samples.fingerprint != evaluated.claim.get("data"):
        raise evaluated.no_rows("their content has changed")
    return samples


def replay(evaluated: Evaluated, service: GeneratorService, samples: EvalSamples, count: int) -> Replayed:
    """Answer `count` questions from all over an evaluation again, as many at once as requests are."""
    stored = {line["id"]: line["text"] for line in evaluated.result.predictions}
    decoding = Decoding(**evaluated.result.facts["decoding"])
    chosen = [samples[number] for number in spread(len(samples), count)]
    jobs: list[Job] = []
    for sample in chosen:
        prompt = service.lm.encoder.prompt(sample.messages, sample.tools)
        jobs.append(Job(service.prepare_prompt(prompt, sample.where, decoding, is_chat=True), math.inf))
    for start in range(0, len(jobs), BATCH_SIZE):
        service.run(jobs[start : start + BATCH_SIZE])
    differ = [
        sample.id for sample, job in zip(chosen, jobs, strict=True) if job.result.result().text != stored.get(sample.id)
    ]
    first = differ[0] if differ else None
    return Replayed(evaluated.result.folder, len(chosen) - len(differ), len(chosen), first)
