"""Four concepts to steer towards, for `benchmarks.steering`: prompts, the tokens that are wanted, and contrast texts.

A prompt is neutral: the concept is one way to go on among others. Each has a pair of contrast texts with the same end,
one that calls for the concept and one that calls for its opposite. A model with a chat template gets a request and the
opening of the answer; a base model gets plain text. Everything is made of templates and fillers, in a fixed order.
"""

import random
from itertools import product
from typing import Any, NamedTuple

from fisher_vmap.data.render import Renderer

CONCEPTS = ("verb form", "French", "sentiment", "list")
EACH = 40  # prompts of a concept, of which the first half is for choosing
SYSTEM = "Be brief."  # in place of a longer one that chat templates put in by themselves


class Case(NamedTuple):
    """A prompt, and its contrast texts: where the concept is called for, and where its opposite is."""

    neutral: str
    wanted: str
    unwanted: str


class Turn(NamedTuple):
    """What a user asks, and how the answer begins; `before` comes first in plain text."""

    request: str
    opening: str = ""
    before: str = ""


WORDS: dict[str, str] = {
    "verb form": """working reading writing talking playing running walking cooking singing dancing painting swimming
        drawing looking making doing being going taking getting having using eating watching listening learning studying
        thinking trying telling helping living spending traveling building exploring collecting riding sleeping drinking
        teaching wearing speaking staying meeting seeing sharing helping growing fishing hiking climbing gardening""",
    "French": """La Le Les Un Une Il Elle Ils Je Nous Vous Voici Bon Bien Ce Cette Ces Dans Oui Pour Bonjour Si Selon
        Tout Mais Votre Notre Mon""",
    "sentiment": """good great wonderful excellent amazing fantastic beautiful brilliant delightful perfect lovely
        superb outstanding fun enjoyable incredible awesome nice best magnificent charming impressive marvelous""",
    "list": "1 - * # ``` • ## ### ** A. (1) 1.",
}
NAMES = ("Anna", "Peter", "Maria", "Daniel", "Julia", "Thomas", "Helen", "Robert")
FRAMES = ("{} likes", "{} started", "In the evening {} loves", "This year {} began", "At home {} prefers")
DOING = (("swimming", "swim"), ("cooking", "cook"), ("reading", "read"), ("singing", "sing"), ("painting", "paint"))

THINGS = (
    *("rain", "gold", "a violin", "cheese", "a desert", "the moon", "salt", "a bridge", "paper", "honey"),
    *("a volcano", "a library", "iron", "a novel", "a river", "coffee", "a clock", "silk", "an island", "bread"),
)
HABITS = (
    *("go to the theatre", "keep a dog", "learn to swim", "live in cities", "drink tea", "read the news", "wear hats"),
    *("plant trees", "play chess", "travel by train", "eat breakfast", "write letters", "save money", "go to school"),
    *("walk in the woods", "collect stamps", "visit museums", "sleep at night", "listen to music", "ride bicycles"),
)
TASKS = (
    *("make tea", "wash a car", "plan a trip", "learn a language", "write a letter", "bake bread", "clean a window"),
    *("save money", "grow tomatoes", "repair a bicycle", "find a job", "stay healthy", "choose a book", "paint a wall"),
    *("train a dog", "pack a bag", "cook rice", "sleep better", "prepare for a test", "make new friends"),
)
TOPICS = (
    *("good habits", "the planets", "healthy food", "the seasons", "Italian cities", "board games", "garden tools"),
    *(
        "musical instruments",
        "sea animals",
        "kinds of bread",
        "camping",
        "winter sports",
        "famous bridges",
        "computers",
    ),
    *("the human body", "public transport", "old castles", "wild birds", "tropical fruit", "the weather"),
)
FILMS = ("film", "party", "concert", "play", "restaurant", "hotel", "museum", "show")
VISITS = (
    "We were there on Monday. The {} was",
    "I will tell you about last night. The {} was",
    "My brother asked me how it went. I told him that the {} was",
    "Here is my review. The {} was",
    "It was our first time. We thought that the {} was",
)

FRENCH = "Question: What is the sea?\nAnswer: {}\n"
LIST = "Question: How do I boil an egg?\nAnswer:\n{}\n"


def cases(concept: str, tokenizer: Any) -> list[Case]:
    """All prompts of a concept in a fixed order, for a model with a chat template or without."""
    chat = bool(tokenizer.chat_template)
    made = [Case(*(_text(turn, tokenizer, chat, concept) for turn in turns)) for turns in _turns(concept, chat)]
    random.Random(0).shuffle(made)
    assert len({case.neutral for case in made}) == len(made) == EACH
    return made


def tokens(concept: str, tokenizer: Any) -> list[int]:
    """The wanted tokens: those of the concept's words that are one token where the answer goes on."""
    space = "" if concept == "list" or (concept == "French" and tokenizer.chat_template) else " "
    found = [tokenizer.encode(space + word, add_special_tokens=False) for word in WORDS[concept].split()]
    return sorted({ids[0] for ids in found if len(ids) == 1})


def _turns(concept: str, chat: bool) -> list[tuple[Turn, Turn, Turn]]:
    """For each prompt: neutral, wanted, unwanted."""
    if concept == "verb form":
        return [_verbs(name, frame) for name, frame in product(NAMES, FRAMES)]
    if concept == "sentiment":
        return [_review(visit.format(film)) for film, visit in product(FILMS, VISITS)]
    if concept == "French":
        asked = [f"What is {thing}?" for thing in THINGS] + [f"Why do people {habit}?" for habit in HABITS]
        examples = FRENCH.format("La mer est une grande étendue d'eau salée."), FRENCH.format("It is salt water.")
        return [_question(text, " Answer in French.", " Answer in English.", examples, chat) for text in asked]
    asked = [f"How do I {task}?" for task in TASKS] + [f"Tell me about {topic}." for topic in TOPICS]
    examples = LIST.format("1. Boil water.\n2. Add the egg.\n3. Wait."), LIST.format("You boil it in water.")
    return [_question(text, " Answer with a list.", " Answer in one sentence.", examples, chat) for text in asked]


def _verbs(name: str, frame: str) -> tuple[Turn, Turn, Turn]:
    opening = frame.format(name)
    verb = opening.split()[-1]
    others = [other for other in NAMES if other != name][:3]
    with_ing, with_to = (
        " ".join(f"{other} {verb} {form}." for other, form in zip(others, forms, strict=False))
        for forms in ([ing for ing, _ in DOING], [f"to {plain}" for _, plain in DOING])
    )
    say = "Write about people."
    return Turn(say, opening), Turn(say, f"{with_ing} {opening}"), Turn(say, f"{with_to} {opening}")


def _review(opening: str) -> tuple[Turn, Turn, Turn]:
    say = "Write a short review."
    glad = "Everybody was happy and we all loved it. "
    sad = "Everybody was angry and we all hated it. "
    return Turn(say, opening), Turn(say, glad + opening), Turn(say, sad + opening)


def _question(text: str, yes: str, no: str, examples: tuple[str, str], chat: bool) -> tuple[Turn, Turn, Turn]:
    if chat:
        return Turn(text), Turn(text + yes), Turn(text + no)
    return Turn(text), Turn(text, before=examples[0]), Turn(text, before=examples[1])


def _text(turn: Turn, tokenizer: Any, chat: bool, concept: str) -> str:
    if chat:
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": turn.request}]
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)) + turn.opening
    if turn.opening:
        return turn.opening
    return f"{turn.before}Question: {turn.request}\nAnswer:" + "\n" * (concept == "list")


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The ids of a text as it stands, with the special tokens that the model begins with."""
    return list(Renderer(tokenizer).render(text).ids)
