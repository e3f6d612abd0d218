"""The characters of the standard library: numbering, split, streams, and a model that learns from them."""

import math

import pytest
import torch

from gradkernels.tasks import CharacterModel, Trainer, characters
from gradkernels.tasks.text import VOCABULARY, decode, encode, source_files
from gradkernels.tasks.trainer import evaluate


@pytest.fixture(scope="module")
def data():
    return characters(batch=4, length=32)


def test_every_vocabulary_character_round_trips():
    assert encode(VOCABULARY).tolist() == list(range(len(VOCABULARY)))
    assert decode(encode(VOCABULARY)) == VOCABULARY


def test_other_characters_are_question_marks_and_tabs_are_spaces():
    assert decode(encode("\té\x0c€x")) == "    ???x"
    assert encode("").shape == (0,)


def test_sources_are_the_library_and_in_order():
    names = [path.name for path in source_files()]
    assert names == sorted(names)
    assert {"argparse.py", "ast.py", "typing.py"} <= set(names)


def test_text_is_python(data):
    assert "def __init__(self" in decode(data.train[:200_000])
    assert len(data.train) > 5 * len(data.validation) > 100_000


def test_no_file_is_in_both_splits(data):
    validation, train = decode(data.validation), decode(data.train)
    found = 0
    for path in source_files():
        piece = decode(encode(path.read_text("utf-8")[:4000]))[:400]
        if piece in validation:
            found += 1
            assert piece not in train, path
    assert found > 3


def test_streams_go_on_where_they_ended(data):
    batches = data.batches()
    first, second = next(batches), next(batches)
    assert first[0].shape == first[1].shape == (32, 4) and first[0].dtype == torch.int64
    assert torch.equal(first[0][1:], first[1][:-1])
    assert torch.equal(second[0][0], first[1][-1])
    rows = (len(data.train) - 1) // 4
    for stream in range(4):
        begin = stream * rows
        assert torch.equal(first[0][:, stream], data.train[begin : begin + 32].long())


def test_validation_is_one_pass_and_training_begins_again():
    data = characters(batch=64, length=1000)
    passes = list(data.batches("validation"))
    assert len(passes) == ((len(data.validation) - 1) // 64) // 1000
    batches = data.batches()
    first = next(batches)[0]
    count = ((len(data.train) - 1) // 64) // 1000
    for _ in range(count - 1):
        next(batches)
    assert torch.equal(next(batches)[0], first)


def test_seed_orders_the_training_files_only():
    one, same, other = (characters(batch=2, length=8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.train, same.train) and not torch.equal(one.train, other.train)
    assert torch.equal(one.train.bincount(), other.train.bincount())
    assert torch.equal(one.validation, other.validation)


@pytest.mark.parametrize(("batch", "length"), [(0, 8), (8, 0)])
def test_bad_sizes(batch, length):
    with pytest.raises(ValueError, match="at least 1"):
        characters(batch=batch, length=length)


def test_bad_split_and_too_few_characters(data):
    with pytest.raises(ValueError, match="split"):
        next(data.batches("test"))
    with pytest.raises(ValueError, match="too few"):
        next(characters(batch=4, length=10**7).batches())


def test_unknown_cell():
    with pytest.raises(ValueError, match="lstm, gru, rnn"):
        CharacterModel("elman")


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_training_learns_and_repeats(data, cell):
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = Trainer(CharacterModel(cell, hidden=32), data.batches())
        for steps in (1, 19, 20):  # in turns or at once is the same
            trainer.run(steps)
        losses.append(trainer.losses)
    assert losses[0] == losses[1] and trainer.characters == 40 * 32 * 4
    assert abs(losses[0][0] - math.log(len(VOCABULARY))) < 0.3
    assert losses[0][-1] < losses[0][0] - 0.8
    assert 1 < evaluate(trainer.model, data.batches("validation"), 3) < losses[0][0]


def test_sample_goes_on_from_the_prompt_and_repeats():
    torch.manual_seed(0)
    model = CharacterModel(hidden=16)
    one, same, other = (model.sample("def ", 20, seed=seed) for seed in (0, 0, 1))
    assert one == same != other and one.startswith("def ") and len(one) == 24
    assert model.sample("x", 0) == "x"
