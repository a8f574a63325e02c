"""What the demo web says about its scenes: careful captions, loose alt texts, other languages, and no help at all.

Every text about a scene comes with its claims, (colour, kind) pairs with None for what is not stated, so that
`agrees` decides by facts and never by parsing. All word lists of the demo web stand here and in `languages`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from pipelines.demo.languages import LANGUAGES, Language
from pipelines.demo.scenes import OPPOSITE, Scene, Thing

Claim = tuple[str | None, str | None]  # (colour, kind)
Item = TypeVar("Item")

BOILERPLATE = (
    "image",
    "click to enlarge",
    "picture",
    "photo of the day",
    "no description available",
    "loading, please wait",
    "share this on your profile",
    "advertisement",
    "thumbnail",
    "view full size in a new window",
)
FILE_NAMES = (
    "IMG_{0:04d}.jpg",
    "DSC{0:05d}.JPG",
    "P10{0:05d}.jpg",
    "scan-{0:03d}.png",
    "image ({1}).webp",
    "DCIM_{0:04d}",
)
SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
TO = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}

CAREFUL_ONE = (
    "{a}",
    "a picture of {a}",
    "there is {a} in the picture",
    "a drawing that shows {a}",
    "{a} on a pale background",
)
CAREFUL_TWO = (
    "{a} {to} {b}",
    "{b} {from_} {a}",
    "a picture of {a} {to} {b}",
    "{a} and {b}",
    "there is {a} {to} {b}",
)
CAREFUL_THREE = ("{a} {to} {b}, and {c}", "{a}, {b} and {c}", "a picture of {c}, with {a} {to} {b}")
LOOSE = (
    "{a}",
    "my {thing} drawing",
    "{thing}",
    "look at this {thing}",
    "{thing} picture for children",
    "the {kind} I drew, in {colour}",
    "{colour} {kind} - free wallpaper",
    "one more {thing}!",
    "{a} from our collection",
)
LOOSE_KIND = ("a nice {kind} today", "drawing of {kind_a}")


@dataclass(frozen=True)
class Text:
    """A text, its language (ISO 639-1) and what it claims to be in the picture."""

    text: str
    claims: tuple[Claim, ...]
    language: str = "en"


def agrees(text: Text, scene: Scene) -> bool:
    """Whether everything the text claims is in the scene."""
    return all(any(c in (None, t.colour) and k in (None, t.kind) for t in scene.things) for c, k in text.claims)


def pick(rng: np.random.Generator, items: Sequence[Item]) -> Item:
    return items[int(rng.integers(len(items)))]


def _article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def _full(rng: np.random.Generator, thing: Thing) -> str:
    return _article(f"{pick(rng, SIZE_WORDS[thing.size])} {thing.colour} {thing.kind}")


def _claims(things: Sequence[Thing]) -> tuple[Claim, ...]:
    return tuple((t.colour, t.kind) for t in things)


def careful(rng: np.random.Generator, scene: Scene) -> Text:
    """A human's caption: every thing with size and colour, mostly with how the first two lie."""
    a, b, c = ([_full(rng, t) for t in scene.things] + ["", ""])[:3]
    template = pick(rng, {1: CAREFUL_ONE, 2: CAREFUL_TWO, 3: CAREFUL_THREE}[len(scene.things)])
    relation = scene.relation or "left of"
    text = template.format(a=a, b=b, c=c, to=TO[relation], from_=TO[OPPOSITE[relation]])
    return Text(text, _claims(scene.things))


def loose(rng: np.random.Generator, scene: Scene) -> Text:
    """An alt text as the web has it: mostly one thing of the scene, sometimes two, seldom without colour."""
    thing = pick(rng, scene.things)
    if len(scene.things) > 1 and rng.random() < 0.4:
        return Text(" and ".join(f"{t.colour} {t.kind}" for t in scene.things[:2]), _claims(scene.things[:2]))
    if rng.random() < 0.1:
        text = pick(rng, LOOSE_KIND).format(kind=thing.kind, kind_a=_article(thing.kind))
        return Text(text, ((None, thing.kind),))
    name = f"{thing.colour} {thing.kind}"
    text = pick(rng, LOOSE).format(a=_article(name), thing=name, colour=thing.colour, kind=thing.kind)
    return Text(text.capitalize() if rng.random() < 0.3 else text, _claims([thing]))


def ordinary(rng: np.random.Generator, scene: Scene) -> Text:
    """What stands on an ordinary page: half careful, half loose."""
    return careful(rng, scene) if rng.random() < 0.5 else loose(rng, scene)


def foreign(rng: np.random.Generator, scene: Scene) -> Text:
    """The scene's first things in another language: one in a sentence, two by where they are."""
    code = pick(rng, tuple(LANGUAGES))
    words = LANGUAGES[code]
    names = [_name(words, t) for t in scene.things[:2]]
    if scene.relation is None:
        return Text(words.one.format(names[0]), _claims(scene.things[:1]), code)
    first, second = names if scene.relation in ("left of", "above") else names[::-1]
    template = words.beside if scene.relation in ("left of", "right of") else words.stacked
    return Text(template.format(first, second), _claims(scene.things[:2]), code)


def _name(words: Language, thing: Thing) -> str:
    noun, gender = words.kinds[thing.kind]
    size, colour = words.sizes[thing.size][gender], words.colours[thing.colour][gender]
    return words.order.format(article=words.articles[gender], size=size, colour=colour, noun=noun)


def boilerplate(rng: np.random.Generator) -> Text:
    return Text(pick(rng, BOILERPLATE), ())


def file_name(rng: np.random.Generator) -> Text:
    number = int(rng.integers(1, 9999))
    return Text(pick(rng, FILE_NAMES).format(number, number % 40), ())
