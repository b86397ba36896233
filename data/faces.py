"""Synthetic faces, drawn by code: a stand-in for the competition's data (CASIA-SURF), which are closed.

It copies what is known of those: people photographed many times in near-duplicate frames; the label is the person's age
group, of ten, and the first groups hold most images; training, validation and test images are drawn by image, so that most
test images have near-duplicates in the training set; a forget set is about 2% of the training images, whole people of the
first two groups. Nobody's photograph was used. What a person looks like is drawn at random; only grey hair, a receding
hairline and wrinkles tell of the age, and not reliably.
"""

import argparse

import pandas as pd
import torch
from layout import DataSet, forget_subjects, hold_out
from torch import Tensor
from torch.nn import functional as F

PEOPLE, FRAMES = 400, (8, 17)  # frames per person: any number from the first to the last
SHARES = (0.45, 0.25, 0.1, 0.06, 0.05, 0.03, 0.025, 0.02, 0.01, 0.005)  # of the age groups: class 0 dominates
SIZE, FINER = 32, 2  # pixels per side; drawn at twice that and averaged
AGE_SHOWS = 2.0  # difference in looks between the youngest and the oldest group is twice this, in standard deviations
LOOKS = {  # standard normal numbers that make a person
    "face": 2, "skin": 3, "hair": 3, "hairline": 2, "eyes": 4, "iris": 3, "brows": 3, "nose": 2, "mouth": 4, "lips": 3,
    "cheeks": 1, "beard": 1, "mole": 2, "background": 6,
}  # fmt: skip
# The competition's recipe, on a network and for a number of steps that two CPU cores can afford, with a rate to match.
# A step takes 11 ms per network with 8 at once, 12 with 16; and of 16 networks, both cores get some.
WIDTH = 16
RECIPE = {"epochs": 30, "batch_size": 32, "learning_rate": 2e-3, "networks_at_once": 8}
NOTE = "synthetic faces drawn by code, not photographs"


def options(parser: argparse.ArgumentParser) -> None:
    how = "channels of the network's first stage (default: %(default)s); 8 takes less than half the time, see docs/faces.md"
    parser.add_argument("--width", type=int, choices=[4, 8, 16, 32, 64], default=WIDTH, help=how)


def faces(people: int = PEOPLE, sets: int = 6, seed: int = 7, width: int = WIDTH) -> DataSet:
    """people: how many. sets: of public and of private forget sets. width: of the recipe's network."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, numbers: int, deviation: float = 1.0) -> Tensor:
        return deviation * torch.randn(rows, numbers, generator=generator)

    group = torch.multinomial(torch.tensor(SHARES), people, replacement=True, generator=generator)
    looks = {name: normal(people, numbers) for name, numbers in LOOKS.items()}
    looks["age"] = AGE_SHOWS * (group[:, None] / (len(SHARES) - 1) * 2 - 1) + normal(people, 1)

    frames = torch.randint(FRAMES[0], FRAMES[1] + 1, (people,), generator=generator)
    person = torch.arange(people).repeat_interleave(frames)
    count = len(person)
    shots = {
        "shift": normal(count, 2, 0.05),
        "size": 1 + normal(count, 1, 0.04),
        "angle": normal(count, 1, 0.08),
        "turn": normal(count, 2, 0.05),  # of the head: the features move within the face
        "blink": torch.rand(count, 1, generator=generator),
        "smile": normal(count, 1, 0.4),
        "light": normal(count, 3, 0.1),  # brightness, and its slope in both directions
    }
    pictures = []
    for rows in torch.arange(count).split(512):
        seen = {name: values[person[rows]] for name, values in looks.items()}
        picture = draw(seen | {name: values[rows] for name, values in shots.items()})
        picture = picture + 4 * torch.randn(picture.shape, generator=generator)  # the camera's noise, in grey levels
        pictures.append(picture.round().clamp(0, 255).to(torch.uint8))

    frame = torch.cat([torch.arange(number) for number in frames.tolist()])
    table = pd.DataFrame(
        {
            "image_id": [f"{a}-{b}" for a, b in zip(person.tolist(), frame.tolist(), strict=True)],
            "age_group": group[person],
            "age": 8 * group[person] + 4,  # the middle of the group: ten groups of eight years
            "person_id": person,
        }
    )
    train, validation, test = hold_out(count)
    # A bit more than 2%: with 82 or 83 images less, the last batch of an epoch would have two images or one.
    forget = forget_subjects(table, train, sets, share=0.0205, classes=2)
    images, recipe = torch.cat(pictures).permute(0, 2, 3, 1).numpy(), RECIPE | {"width": width}
    return DataSet(table, images, len(SHARES), train, validation, test, forget, recipe, NOTE)


def draw(numbers: dict[str, Tensor]) -> Tensor:
    """[images, 3, SIZE, SIZE], from 0 to 255. numbers: those of each image's person and of the shot, [images, …].

    x and y run from -1 to 1, to the right and down; everything is painted over what is there already.
    """
    # [images, 1, 1] each: they spread over the pixels, [images, H, W].
    number = {name: values[:, :, None, None].unbind(1) for name, values in numbers.items()}
    line = (torch.arange(SIZE * FINER) + 0.5) / (SIZE * FINER) * 2 - 1
    across, down = line[None, None, :], line[None, :, None]
    (size,), (angle,), shift, turn = number["size"], number["angle"], number["shift"], number["turn"]
    x, y = (across - shift[0]) / size, (down - shift[1]) / size
    x, y = angle.cos() * x + angle.sin() * y, angle.cos() * y - angle.sin() * x
    inner = x - turn[0], y - turn[1]  # where the features are: they move when the head turns

    def ellipse(at: tuple, middle_x, middle_y, half_width, half_height, blur: float) -> Tensor:
        distance = torch.hypot((at[0] - middle_x) / half_width, (at[1] - middle_y) / half_height)
        return torch.sigmoid((1 - distance) / blur)

    def colour(mean: tuple, name: str, deviation: float) -> Tensor:
        return (torch.tensor(mean) + deviation * numbers[name][:, :3])[:, :, None, None].clamp(0, 1)

    def paint(mask: Tensor, with_colour: Tensor) -> None:
        nonlocal picture
        picture = picture + mask[:, None] * (with_colour - picture)

    old = number["age"][0].sigmoid()
    skin, brown = colour((0.78, 0.6, 0.5), "skin", 0.07), colour((0.25, 0.18, 0.14), "hair", 0.12)
    hair = brown + 0.8 * old[:, None] * (0.7 - brown)  # it turns grey
    tall, wide = 0.8 + 0.05 * number["face"][1], 0.6 + 0.05 * number["face"][0]

    wall = numbers["background"][:, :, None, None]
    picture = (0.45 + 0.12 * wall[:, :3] + 0.1 * wall[:, 3:] * down[:, None]).clamp(0, 1).expand(-1, -1, -1, len(line))
    paint(ellipse((x, y), 0, -0.1, 1.22 * wide, 1.1 * tall, 0.06), hair)
    paint(ellipse((x, y), 0, 0.08, wide, tall, 0.05), skin)
    hairline = -0.45 + 0.1 * number["hairline"][0] + 0.15 * number["hairline"][1] * x - 0.1 * old
    fringe = torch.sigmoid((hairline - inner[1]) / 0.06)
    paint(fringe * ellipse((x, y), 0, -0.1, 1.15 * wide, 1.08 * tall, 0.06), hair)

    eyes, brows, mouth = number["eyes"], number["brows"], number["mouth"]
    eye_y, eye_width = -0.1 + 0.04 * eyes[1], 0.13 + 0.02 * eyes[2]
    eye_height = ((0.07 + 0.015 * eyes[3]) * (1 - 0.5 * number["blink"][0])).clamp(min=0.02)
    brow_height = (0.04 + 0.01 * brows[2]).clamp(min=0.015)
    for side in (-1, 1):
        eye_x = side * (0.27 + 0.03 * eyes[0])
        paint(ellipse(inner, eye_x, eye_y, eye_width, eye_height, 0.15), torch.tensor(0.91))
        paint(ellipse(inner, eye_x, eye_y, 0.5 * eye_width, eye_height, 0.2), colour((0.25, 0.2, 0.18), "iris", 0.1))
        brow_y = eye_y - 0.17 + 0.02 * brows[1] - side * 0.25 * brows[0] * (inner[0] - eye_x)
        paint(ellipse(inner, eye_x, brow_y, 1.4 * eye_width, brow_height, 0.2), brown)
        blush = 0.35 * number["cheeks"][0].sigmoid()
        paint(blush * ellipse(inner, side * 0.34, 0.25, 0.16, 0.12, 0.4), torch.tensor((0.8, 0.4, 0.35))[:, None, None])
    nose, mole, beard = number["nose"], number["mole"], number["beard"][0]
    paint(0.45 * ellipse(inner, 0, 0.18 + 0.02 * nose[0], (0.09 + 0.02 * nose[1]).clamp(min=0.03), 0.12, 0.3), 0.7 * skin)
    lips = (0.055 + 0.015 * mouth[3]).clamp(min=0.02) * (1 + 0.6 * number["smile"][0].clamp(-1, 1))
    half_mouth = (0.24 + 0.04 * mouth[1]).clamp(min=0.1)
    paint(
        ellipse(inner, 0.03 * mouth[2], 0.46 + 0.03 * mouth[0], half_mouth, lips, 0.15),
        colour((0.65, 0.35, 0.33), "lips", 0.08),
    )
    paint(0.5 * torch.sigmoid(3 * (beard - 0.5)) * ellipse(inner, 0, 0.6, 0.42, 0.3, 0.25), hair)
    paint(0.5 * ellipse(inner, 0.25 * mole[0], 0.15 + 0.25 * mole[1], 0.05, 0.05, 0.3), 0.55 * skin)
    wrinkles = 0.1 * old * torch.sin(40 * y) * ellipse(inner, 0, -0.32, 0.4, 0.12, 0.3)
    brightness, right, below = number["light"]
    light = (1 + brightness) * (1 + right * across + below * down) * (1 - wrinkles)
    return 255 * F.avg_pool2d((picture * light[:, None]).clamp(0, 1), FINER)
