"""Questions of general knowledge that have nothing to do with the context."""

from random import Random

from experiments.tasks import haystack as hay
from experiments.tasks.example import Draft, Example, FollowUp

_FOLLOW_UPS = 3

_FACTS = (
    ("What is the capital of France?", "The capital of France is", "Paris"),
    ("What is the capital of Italy?", "The capital of Italy is", "Rome"),
    ("What is the capital of Japan?", "The capital of Japan is", "Tokyo"),
    ("What is the capital of Germany?", "The capital of Germany is", "Berlin"),
    ("What is the capital of Spain?", "The capital of Spain is", "Madrid"),
    ("What is the capital of Russia?", "The capital of Russia is", "Moscow"),
    ("What is the capital of England?", "The capital of England is", "London"),
    ("What is the capital of Egypt?", "The capital of Egypt is", "Cairo"),
    ("What is the capital of Greece?", "The capital of Greece is", "Athens"),
    ("What is the capital of China?", "The capital of China is", "Beijing"),
    ("On which continent is Kenya?", "Kenya is on the continent of", "Africa"),
    ("On which continent is Brazil?", "Brazil is on the continent of", "South America"),
    ("Which planet is known as the red planet?", "The red planet is", "Mars"),
    ("Which planet is the largest of the solar system?", "The largest planet is", "Jupiter"),
    ("Which planet is the closest to the Sun?", "The planet closest to the Sun is", "Mercury"),
    ("Around which star does the Earth move?", "The Earth moves around the", "Sun"),
    ("What gas do plants take in from the air?", "Plants take in carbon", "dioxide"),
    ("What gas do we need to breathe?", "The gas that we need to breathe is", "oxygen"),
    ("What is the chemical symbol of water?", "The chemical symbol of water is", "H2O"),
    ("What is the chemical symbol of gold?", "The chemical symbol of gold is", "Au"),
    ("What is frozen water called?", "Frozen water is called", "ice"),
    ("Which organ pumps blood?", "The organ that pumps blood is the", "heart"),
    ("Which organ do we think with?", "The organ that we think with is the", "brain"),
    ("Which sense do we use our ears for?", "We use our ears to", "hear"),
    ("Which animal barks?", "The animal that barks is the", "dog"),
    ("Which insect makes honey?", "The insects that make honey are", "bees"),
    ("Which animal gives us wool?", "The animal that gives us wool is the", "sheep"),
    ("What is the largest animal on Earth?", "The largest animal on Earth is the blue", "whale"),
    ("What is the largest ocean?", "The largest ocean is the", "Pacific"),
    ("What is the highest mountain?", "The highest mountain is Mount", "Everest"),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William", "Shakespeare"),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo", "da Vinci"),
    ("Who found the law of gravity?", "The law of gravity was found by Isaac", "Newton"),
    ("Who developed relativity?", "The theory of relativity is by Albert", "Einstein"),
    ("Who wrote about evolution?", "The theory of evolution is by Charles", "Darwin"),
    ("Who was the first president of the USA?", "The first president was George", "Washington"),
    ("Who first walked on the Moon?", "The first man on the Moon was Neil", "Armstrong"),
    ("Which day comes after Monday?", "The day after Monday is", "Tuesday"),
    ("Which day comes before Sunday?", "The day before Sunday is", "Saturday"),
    ("Which month comes after March?", "The month after March is", "April"),
    ("Which month comes first in the year?", "The first month of the year is", "January"),
    ("Which season comes after summer?", "The season after summer is", "autumn"),
    ("What is the opposite of hot?", "The opposite of hot is", "cold"),
    ("What is the opposite of up?", "The opposite of up is", "down"),
    ("What is the opposite of black?", "The opposite of black is", "white"),
    ("What color do blue and yellow make?", "Blue and yellow make", "green"),
    ("What color is a ripe banana?", "A ripe banana is", "yellow"),
    ("What is the French word for hello?", "The French word for hello is", "bonjour"),
    ("Which language do people speak in Brazil?", "In Brazil people speak", "Portuguese"),
    ("Which language do people speak in Mexico?", "In Mexico people speak", "Spanish"),
    ("How many minutes are in an hour?", "The number of minutes in an hour is", "60"),
    ("How many hours are in a day?", "The number of hours in a day is", "24"),
    ("How many days are in a week?", "The number of days in a week is", "seven"),
    ("How many legs does a spider have?", "The number of legs of a spider is", "eight"),
    ("How many sides does a triangle have?", "The number of sides of a triangle is", "three"),
    ("What is two plus two?", "Two plus two is", "four"),
    ("What do we call a baby cat?", "A baby cat is called a", "kitten"),
    ("What do caterpillars turn into?", "Caterpillars turn into", "butterflies"),
    ("What do we call a doctor for teeth?", "A doctor for teeth is called a", "dentist"),
    ("Which fruit is cider made from?", "Cider is made from", "apples"),
)

QUESTIONS = tuple(FollowUp(question, prefix, (answer,)) for question, prefix, answer in _FACTS)
"""The questions, each with one short answer."""


def off_context(
    task: str, random: Random, *, haystack: hay.Filler = "prose", max_new_tokens: int = 16
) -> Draft:
    """Returns filler, and a question that it does not answer.

    A small model answers some of them only, so that the likelihood of the reference tells more than
    the score: see `experiments.tasks.prompt.reference_ids`.

    Args:
      task: the name of the task.
      random: draws everything.
      haystack: `"prose"` or `"noise"`.
      max_new_tokens: of the answer.

    Raises:
      ValueError: the haystack is unknown.
    """
    asked, *follow_ups = random.sample(QUESTIONS, 1 + _FOLLOW_UPS)
    pieces = hay.filler(haystack, random)

    def build(units: int) -> Example:
        context, _ = hay.hide(pieces(units), ())
        return Example(
            task=task,
            instruction="Read the following text.",
            context=context,
            question=asked.question,
            answer_prefix=asked.answer_prefix,
            references=asked.references,
            max_new_tokens=max_new_tokens,
            follow_ups=tuple(follow_ups),
        )

    return Draft(build)
