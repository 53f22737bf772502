import pytest

from illada.text.blanks import encode_with_blanks
from illada.tiny.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(num_examples=500)


def test_blanks_become_masks(tokenizer):
    ids = encode_with_blanks(tokenizer, "Tom has <[MASK]*3> and<[MASK]> cups.", 5)
    pieces = tokenizer(["Tom has", " and", " cups."], add_special_tokens=False)["input_ids"]
    assert ids == [0, *pieces[0], 5, 5, 5, *pieces[1], 5, *pieces[2]]


@pytest.mark.parametrize(
    "text, message", [("no blank here", "must contain a blank"), ("a <[MASK]*0> b", "at least one")]
)
def test_bad_blanks(tokenizer, text, message):
    with pytest.raises(ValueError, match=message):
        encode_with_blanks(tokenizer, text, 5)
