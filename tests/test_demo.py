"""The demo: what it measures, says and writes."""

import json

import pytest

from gradkernels.__main__ import main

SMALL = ["--steps", "6", "--hidden", "8", "--batch", "2", "--length", "8"]


@pytest.mark.slow
def test_json_and_page(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert main(["demo", *SMALL, "--json", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["agreement"]["agree"] and found["settings"]["steps"] == 6 and "6/6" in err
    assert list(found["horizon"]) == ["recurrent.l0", "recurrent.l1"]
    assert all(h is None or 0 <= h < 8 for h in found["horizon"].values())
    assert found["html"] == str(page) and "recurrent.l0" in page.read_text(encoding="utf-8")


@pytest.mark.slow
def test_text_without_a_page(capsys):
    assert main(["demo", *SMALL, "--cell", "gru", "--html", ""]) == 0
    out = capsys.readouterr().out
    assert "The loss curves agree at every step." in out and "of 7 steps" in out and "browser" not in out


def test_a_page_that_cannot_be_written_is_refused_before_training(capsys, tmp_path):
    for option in ("--html", "--plot"):
        assert main(["demo", *SMALL, option, str(tmp_path / "missing" / "file")]) == 2
        out, err = capsys.readouterr()
        assert not out and err == f"{option}: there is no folder {tmp_path / 'missing'}\n"
