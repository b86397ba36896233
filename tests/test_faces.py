"""The synthetic faces: what is known of the competition's data holds for them."""

import faces
import numpy as np
import prepare
import pytest
import torch
from layout import DataSet

from evaluator.data import load, splits
from evaluator.training import FEW_IMAGES, Recipe


@pytest.fixture(scope="module")
def made() -> DataSet:
    return faces.faces(people=120, sets=2)


def test_the_same_faces_on_every_run(made):
    torch.manual_seed(1)  # of no influence
    again = faces.faces(people=120, sets=2)
    assert np.array_equal(again.pictures, made.pictures) and again.table.equals(made.table)
    assert all(np.array_equal(rows, made.forget[split]) for split, rows in again.forget.items())
    assert not np.array_equal(faces.faces(people=10, sets=0, seed=1).pictures[0], made.pictures[0])


def test_the_label_is_a_function_of_the_person(made):
    people = made.table.groupby("person_id")
    assert len(people) == 120 and (people.age_group.nunique() == 1).all() and (people.age.nunique() == 1).all()
    assert people.size().between(*faces.FRAMES).all()
    assert (made.table.age // 8 == made.table.age_group).all()  # groups of equal width


@pytest.fixture(scope="module")
def shipped() -> DataSet:
    return faces.faces()


def test_the_first_class_dominates(shipped):
    group = shipped.table.age_group
    shares = group.value_counts(normalize=True).sort_index()
    assert len(shares) == 10 and shares[0] > 0.4 and shares[:2].sum() > 0.6 and shares[5:].sum() < 0.15


def test_a_forget_set_is_whole_people_of_the_first_two_classes(made):
    seen = set()
    assert list(made.forget) == ["public", "private", "public-2", "private-2"]
    for rows in made.forget.values():
        people = set(made.table.person_id[rows])
        train = made.table.iloc[made.train]
        assert set(train.index[train.person_id.isin(people)]) == set(rows)  # nobody is in both retain and forget
        assert (made.table.age_group[rows] < 2).all()
        assert 0.02 * len(train) <= len(rows) < 0.02 * len(train) + faces.FRAMES[1]
        assert not seen & people
        seen |= people


def test_every_last_batch_is_large_enough(shipped):
    for name, rows in shipped.forget.items():
        for part in (rows, np.setdiff1d(shipped.train, rows)):
            assert len(part) % shipped.recipe["batch_size"] not in range(1, FEW_IMAGES), name


def test_frames_of_a_person_are_near_duplicates_and_never_equal(made):
    pictures = made.pictures.reshape(len(made.pictures), -1).astype(np.float32)
    person = made.table.person_id.to_numpy()
    assert len(np.unique(made.pictures.reshape(len(pictures), -1), axis=0)) == len(pictures)
    same, other = [], []
    for row in range(0, 200, 10):
        distance = np.abs(pictures - pictures[row]).mean(1)
        distance[row] = np.inf
        same.append(distance[person == person[row]].min())
        other.append(distance[person != person[row]].min())
    assert np.mean(same) < 0.8 * np.mean(other)


def test_a_narrower_network():
    one, other = (faces.faces(people=10, sets=0, width=width) for width in (16, 8))
    assert (one.recipe["width"], other.recipe["width"]) == (16, 8)
    assert np.array_equal(one.pictures, other.pictures)


def test_the_folder_says_that_they_are_synthetic(made, tmp_path):
    prepare.prepare(tmp_path / "faces", prepare.Source(lambda: made, ""))
    data = load(tmp_path / "faces", "private-2")
    assert splits(tmp_path / "faces", "*") == ["private", "private-2", "public", "public-2"]
    assert data.retain.images.shape[1:] == (3, 32, 32)
    assert "synthetic" in data.note
    recipe = Recipe.of(data)
    competition = Recipe()
    same = ("optimizer", "weight_decay", "schedule", "class_weighted", "small_images", "epochs")
    assert all(getattr(recipe, field) == getattr(competition, field) for field in same)
    # Rows are sorted by image path, so an image is found by its id.
    rows = made.table.set_index("image_id").loc[data.forget.image_ids]
    assert data.forget.age_group.tolist() == rows.age_group.tolist()
    order = [made.table.index[made.table.image_id == image_id].item() for image_id in data.forget.image_ids]
    assert np.array_equal(data.forget.images.permute(0, 2, 3, 1).numpy(), made.pictures[order])
