"""Classifies a text as command, statement or question by simple rules: labels where a data set has none.

In this order:

    question    its first words are those of a question: what, why, can you, is there, ...
    command     its first words tell somebody to do something: please, let's, I want you to, you must, or a verb that
                begins an order: act, write, explain, ...; whatever it ends with, because many orders quote a question
    question    it ends in a question mark, whatever quotes, brackets and full stops follow, unless the question is a
                quotation within the text
    statement   everything else, an empty text too

"You will come?" is one sentence that asks, and not an order.

First words are those after opening quotes, brackets and a greeting or the name of whom it addresses ("Hello ChatGPT.").
"""

import re

from isotune.data.classification.labels import LABEL_RULES

KINDS = ("command", "statement", "question")
COMMAND, STATEMENT, QUESTION = range(3)

_AFTER_THE_MARK = " \t\r\n\"'”’»)]}.*`"
# a question that the text quotes at its end: an opening quote after other words, and a closing one behind the mark
_QUOTED_END = re.compile(r"""\w\W*[\s:,-]["“«][^"“”«»]*\?\s*["”»][\s.)\]]*$""")
_OPENING = re.compile(r"""[\s"'“‘«(\[{*`#>-]+""")
_GREETING = re.compile(r"(?:hello|hi|hey|dear|ok|okay)\b[^.,!?\n]{0,30}[.,!]\s*", re.I)
_ASKING = re.compile(
    r"(?:what(?! an? )|why|who|whom|whose|which|when|where|how)\b"  # "What a pity" asks nothing
    r"|(?:is|are|am|was|were|do|does|did|has|have|had|can|could|will|would|shall|should|may|might|must)"
    r" (?:i|you|he|she|it|we|they|there|this|that|these|those|anyone|anybody|someone|somebody|the|a|an|my|your|our)\b"
    r"|what's\b|who's\b|where's\b|how's\b|isn't\b|aren't\b|don't you\b|can't you\b",
    re.I,
)
_TELLING = re.compile(
    r"(?:please|kindly|let's|let us)\b"
    r"|i(?: would|'d)? (?:want|need|like|require|ask|expect|order) (?:of )?you (?:to|act)\b"
    r"|i (?:want|need|would like|require) (?:to act|someone who|somebody who)\b"
    r"|you (?:must|will|shall|should|have to|need to|are to|are going to|are about to|are now)\b"
    r"|your (?:task|job|role) is\b"
    r"|(?:never|always|don't|do not|be|do) \w+"
    r"|(?:act|add|analyse|analyze|answer|ask|assume|behave|bring|build|buy|calculate|call|change|check|choose|classify"
    r"|close|come|compare|complete|compose|compute|convert|copy|correct|count|create|define|delete|describe|design"
    r"|develop|discuss|draft|draw|edit|evaluate|explain|expand|extract|fill|find|finish|fix|follow|forget|format"
    r"|generate|get|give|go|guess|help|hold|identify|ignore|imagine|implement|improve|include|keep|leave|list|listen"
    r"|look|make|move|name|note|open|pick|plan|play|pretend|print|produce|propose|provide|put|rate|read|recommend"
    r"|remember|remove|rename|repeat|reply|report|rephrase|respond|return|review|rewrite|run|say|search|select|send"
    r"|set|show|shut|sing|solve|sort|speak|start|state|stop|suggest|sum|summarise|summarize|take|talk|teach|tell"
    r"|think|throw|translate|try|turn|type|use|wait|walk|watch|write)\b"
    r"(?! (?:is|are|was|were|has|have|had|can|will)\b)",  # "Help is on its way" tells nobody to do anything
    re.I,
)


def sentence_type(text: str) -> int:
    """COMMAND, STATEMENT or QUESTION, by the rules of this module."""
    text = text.replace("’", "'")
    whole = text.rstrip(_AFTER_THE_MARK)
    first = _without_opening(text)
    first = _without_opening(_GREETING.sub("", first, count=1) if _GREETING.match(first) else first)
    if _ASKING.match(first):
        return QUESTION
    asks = whole.endswith("?") and not _QUOTED_END.search(text)
    if _TELLING.match(first) and not (asks and first[:4].lower() == "you " and not re.search(r"[.!?:\n]", whole[:-1])):
        return COMMAND
    return QUESTION if asks else STATEMENT


def _without_opening(text: str) -> str:
    opening = _OPENING.match(text)
    return text[opening.end() :] if opening else text


LABEL_RULES.append((KINDS, sentence_type))
