"""Question answering: a paragraph about an invented person or place, among others of the kind.

References:
  RULER (Hsieh et al., COLM 2024, arXiv 2404.06654), section 3, "Question answering".
"""

from collections.abc import Iterator
from random import Random
from typing import NamedTuple

from experiments.tasks import haystack as hay
from experiments.tasks.example import Draft, Example, FollowUp
from experiments.tasks.vocabulary import listed

_GIVEN_NAMES = listed(
    """
    Adela Anton Beatrix Bruno Cecil Clara Conrad Dora Edgar Edith Elmer Ernest Esther Felix Flora
    Gerda Gregor Hanna Harold Helena Hugo Irma Ivan Jonas Julia Karla Lena Leopold Linus Magda
    Marcel Martha Nora Oscar Otto Paula Rosa Rupert Selma Viktor
    """
)
_FAMILY_STARTS = listed(
    """
    Abend Bern Brand Cald Dorn Eben Fal Garn Hax Imber Jost Kell Lund Mord Norr Ost Pell Quar Rav
    Sorn Tav Ulm Varn Wex Yor Zand
    """
)
_FAMILY_ENDS = listed(
    """
    acker bach bury dahl er feld gren holt hausen ing itz kamp lin mark mond nik quist rop sen
    skov thal vik
    """
)
_PLACE_STARTS = listed(
    """
    Alder Bram Chal Dun Elm Fern Glen Hather Inch Kirk Lang Mar Nether Oak Pen Rush Shel Thorn
    Under Wyl
    """
)
_PLACE_ENDS = listed(
    """
    beck borough bridge combe cote dale den field ford gate ham hurst leigh mere minster moor
    port stead thorpe ton wick worth
    """
)
_RIVERS = listed(
    """
    Adle Brent Corve Drava Esk Fyne Gaddis Humbra Isel Kerne Lossie Mella Nidda Orme Pelva Quenne
    Rhisa Selke Tamora Ulva Vesle Wharla Yarra Zelwa
    """
)
_OCCUPATIONS = listed(
    """
    baker barber beekeeper blacksmith bookbinder botanist brewer carpenter cartographer chemist
    clockmaker cobbler dentist diver farmer gardener geologist glassblower judge lawyer librarian
    mathematician miller miner nurse painter photographer physicist pilot plumber poet potter
    printer sculptor surgeon tailor teacher translator weaver
    """
)
_INSTRUMENTS = listed(
    """
    accordion bassoon cello clarinet dulcimer flute guitar harpsichord mandolin oboe piano
    recorder saxophone trombone trumpet tuba viola xylophone zither
    """
)
_PRODUCTS = listed(
    """
    bells boots bricks candles carpets cheese cider clocks cutlery dolls gloves honey kites lace
    lamps linen marbles matches mustard needles paper pearls pottery ropes saddles salt scissors
    sausages spectacles tiles umbrellas whistles
    """
)

# Paragraphs, of which there are more than twice as many persons.
_MOST = 10_000


class _Paragraph(NamedTuple):
    text: str
    questions: tuple[FollowUp, ...]


def question_answering(
    task: str, random: Random, *, questions: int = 4, max_new_tokens: int = 32
) -> Draft:
    """Returns paragraphs of invented facts, and a question that one of them answers.

    The answer is in no other paragraph. The more units, the more paragraphs.

    Args:
      task: the name of the task.
      random: draws everything.
      questions: how many paragraphs are asked about; all but the first are follow-ups.
      max_new_tokens: of the answer.

    Raises:
      ValueError: `questions` is not positive, or above 20.
    """
    if not 1 <= questions <= 20:
        raise ValueError(f"questions must be between 1 and 20, got {questions}")
    new = _paragraphs(random)
    inserts: list[hay.Insert] = []
    turns: list[FollowUp] = []
    while len(turns) < questions:
        paragraph = next(new)
        turn = random.choice(paragraph.questions)
        texts = [insert.text for insert in inserts]
        if _holds(paragraph.text, turns) or any(_holds(text, [turn]) for text in texts):
            continue
        turns.append(turn)
        inserts.append(hay.Insert(random.random(), paragraph.text))
    asked, *follow_ups = turns
    others: list[str] = []

    def build(units: int) -> Example:
        while len(others) < units:
            text = next(new).text
            if not _holds(text, turns):
                others.append(f"{text}\n\n")
        context, spans = hay.hide(others[:units], inserts, "\n\n")
        return Example(
            task=task,
            instruction="Read the following paragraphs. You will be asked a question about them.",
            context=context,
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            references=asked.references,
            max_new_tokens=max_new_tokens,
            any_reference=True,
            follow_ups=tuple(follow_ups),
            facts=spans[:1],
        )

    return Draft(build, most=_MOST)


def _holds(text: str, turns: list[FollowUp]) -> bool:
    """Whether the answer to some question is in a text."""
    return any(reference.lower() in text.lower() for turn in turns for reference in turn.references)


def _paragraphs(random: Random) -> Iterator[_Paragraph]:
    """Yields paragraphs about persons and places, none about the same twice."""
    seen: set[str] = set()
    while True:
        make, name = random.choice(((_person, _name), (_place, _town)))
        subject = name(random)
        if subject not in seen:
            seen.add(subject)
            yield make(subject, random)


def _name(random: Random) -> str:
    family = random.choice(_FAMILY_STARTS) + random.choice(_FAMILY_ENDS)
    return f"{random.choice(_GIVEN_NAMES)} {family}"


def _town(random: Random) -> str:
    return random.choice(_PLACE_STARTS) + random.choice(_PLACE_ENDS)


def _year(random: Random) -> str:
    return str(random.randrange(1600, 1950))


def _person(name: str, random: Random) -> _Paragraph:
    given = name.split()[0]
    year, town = _year(random), _town(random)
    occupation, instrument = random.choice(_OCCUPATIONS), random.choice(_INSTRUMENTS)
    text = (
        f"{name} was born in the town of {town} in the year {year}. After school, {given} became "
        f"a {occupation}. Friends of {given} often heard the sound of the {instrument}, which "
        f"{name} played every evening."
    )
    return _Paragraph(
        text,
        (
            FollowUp(f"In which town was {name} born?", f"{name} was born in the town of", (town,)),
            FollowUp(f"In which year was {name} born?", f"{name} was born in the year", (year,)),
            FollowUp(f"What was the occupation of {name}?", f"{name} was a", (occupation,)),
            FollowUp(f"Which instrument did {name} play?", f"{name} played the", (instrument,)),
        ),
    )


def _place(name: str, random: Random) -> _Paragraph:
    year, founder = _year(random), _name(random)
    river, product = random.choice(_RIVERS), random.choice(_PRODUCTS)
    text = (
        f"{name} is a small town on the river {river}. It was founded in the year {year} by "
        f"{founder}. Visitors come to {name} to buy its famous {product}."
    )
    return _Paragraph(
        text,
        (
            FollowUp(f"On which river does {name} lie?", f"{name} lies on the river", (river,)),
            FollowUp(
                f"In which year was {name} founded?", f"{name} was founded in the year", (year,)
            ),
            FollowUp(
                f"Who founded {name}?",
                f"{name} was founded by",
                (founder, founder.split()[-1]),
            ),
            FollowUp(f"What is {name} famous for?", f"{name} is famous for its", (product,)),
        ),
    )
