"""The report as a file: what is packed into it, that it needs nothing else, and errors. What it shows is in test_report_page.py."""

import base64
import hashlib
import json
import re
from importlib import resources

import numpy as np
import pytest
import torch

import gradkernels as gk
from gradkernels.flow.payload import pack, payload, thin
from gradkernels.flow.report import SCRIPTS
from tests.flow.made_up import alert, layer, snapshot, spectrum


def unpack(text):
    return np.frombuffer(base64.b64decode(text), "<f4")


def data_of(path):
    """What the page was given."""
    return json.loads(re.search(r'id="data">(.*?)</script>', path.read_text(), re.DOTALL)[1])


def steps_sent(run):
    return len(run["layers"][0]["signals"]["h"])


# ------ what is packed


@pytest.mark.parametrize("values", [[], [0.1], [-44.9, None, 1e-3], [None] * 3], ids=["empty", "one", "hole", "holes"])
def test_rows_come_back_as_they_were(values):
    expected = np.array([np.nan if v is None else v for v in values], np.float32)
    np.testing.assert_array_equal(unpack(pack(values)), expected)


def test_a_row_that_was_not_measured_stays_absent():
    assert pack(None) is None


@pytest.mark.parametrize("count", [0, 1, 2, 3, 17, 127, 1024])
def test_thinned_steps_fit_and_end_with_the_last(count):
    for most in (1, 10, 100, 5000):
        found = thin(range(count), 10 * count, most)
        assert found == sorted(set(found)) and set(found) <= set(range(count))
        assert len(found) <= max(2, most // 10) and (not count or found[-1] == count - 1)
        assert count * 10 > most or found == list(range(count))


def test_steps_shown_later_were_shown_before():
    """Else a page would have to be sent rows of steps that are long past."""
    before = set()
    for count in range(1, 300):
        found = set(thin(range(count), 7 * count, 200))
        assert found - before <= {count - 1}
        before |= found


def test_thinning_keeps_steps_at_which_more_is_measured():
    one = snapshot(steps=161, layers=[layer(steps=161, T=3)])
    [run] = payload(one, most=200)["runs"]
    assert run["recorded"] == 161 and 2 < len(run["steps"]) < 20
    assert all((step - 1) % 16 == 0 for step in run["steps"])


def test_a_page_is_sent_what_it_lacks():
    one = snapshot(steps=6, spectra=[spectrum(1), spectrum(4)])
    [run] = payload(one, {"Model": [4, 1]})["runs"]
    assert run["steps"] == [1, 2, 3, 4, 5, 6] and run["have"] == 4 and steps_sent(run) == 2
    assert unpack(run["layers"][0]["signals"]["h"][1]) == pytest.approx(one["layers"][0]["signals"]["h"][5])
    # the last ones that it has may have been under way
    assert [s["step"] for s in run["spectra"]] == [1, 4] and run["spectrum_steps"] == [1, 4]
    [run] = payload(one, {"Model": [6, 4]})["runs"]
    assert run["have"] == 6 and steps_sent(run) == 0 and [s["step"] for s in run["spectra"]] == [4]
    assert len(run["layers"][0]["horizon"]) == 6  # short, and sent whole


def test_many_spectra_are_thinned_too():
    one = snapshot(spectra=[spectrum(step) for step in range(1, 100)])
    [run] = payload(one, most=200)["runs"]
    assert [s["step"] for s in run["spectra"]] == run["spectrum_steps"] and len(run["spectrum_steps"]) <= 200 // 9
    assert run["spectrum_steps"][-1] == 99


# ------ the file


def test_report_has_what_a_monitor_saw(tmp_path):
    model = torch.nn.Sequential(gk.nn.LSTM(3, 5, num_layers=2, bidirectional=True), gk.nn.LayerNorm(10))
    model = torch.nn.ModuleList(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gk.flow.watch(model, spectra=2, on_alert=lambda alert: None) as monitor:
        for _ in range(3):
            model[1](model[0](torch.randn(7, 2, 3))[0]).square().sum().backward()
            optimizer.step()
    path = gk.flow.report(monitor, str(tmp_path / "flow.html"))
    assert path == tmp_path / "flow.html"
    expected = monitor.snapshot()
    [run] = data_of(path)["runs"]
    assert run["model"] == "ModuleList" and run["steps"] == expected["steps"] == [1, 2, 3]
    assert len(run["layers"]) == len(expected["layers"]) == 4
    for found, wanted in zip(run["layers"], expected["layers"]):
        assert found["name"] == wanted["name"] and found["horizon"] == wanted["horizon"]
        for kind in ("signals", "saturation"):
            assert found[kind].keys() == wanted[kind].keys()
            for name, rows in wanted[kind].items():
                for packed, row in zip(found[kind][name], rows, strict=True):
                    assert (packed is None) == (row is None)
                    if row is not None:
                        np.testing.assert_array_equal(unpack(packed), np.array(row, np.float32))
    assert len(run["spectra"]) == len(expected["spectra"]) > 0
    assert unpack(run["spectra"][0]["eigenvalues"]).shape == (10,)


def test_report_needs_nothing_else(tmp_path):
    text = gk.flow.report(snapshot(), tmp_path / "flow.html").read_text()
    assert not re.findall(r"(?:src|href|action|data|poster)=[\"'](?!#|data:,)", text)
    assert set(re.findall(r"https?://[^\"'\s)]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\((?!#)", text)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "connect-src" not in policy
    for tag, code in re.findall(r"<(style|script)>(.*?)</\1>", text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_every_file_of_the_page_is_used():
    names = {path.name for path in (resources.files("gradkernels.flow") / "page").iterdir()}
    assert names == {"index.html", "style.css", *(f"{name}.js" for name in SCRIPTS)}


@pytest.mark.parametrize(
    "name", ["</script><script>alert(1)</script>", "<!--<script>", "a\u2028b", "Größe \\ \"'&amp; ∂", "<!-- script -->"]
)
def test_names_cannot_leave_the_data(name, tmp_path):
    path = gk.flow.report(snapshot(model=name, alerts=[alert(message=name)]), tmp_path / "flow.html")
    [run] = data_of(path)["runs"]
    assert run["model"] == name and run["alerts"][0]["message"] == name
    assert path.read_text().count("<script>") == 1


def test_several_runs_and_a_comparison(tmp_path):
    found = gk.flow.report({"rnn": snapshot(), "lstm": snapshot(2)}, tmp_path / "a.html", comparison={"title": "T"})
    data = data_of(found)
    assert [run["name"] for run in data["runs"]] == ["rnn", "lstm"] and data["comparison"] == {"title": "T"}


@pytest.mark.parametrize(
    ("monitor", "error", "text"),
    [
        (3, TypeError, "expected a monitor, its snapshot or a mapping of names to them, got int"),
        (torch.nn.Linear(1, 1), TypeError, "got Linear"),
        ({"a": None}, TypeError, "got NoneType"),
        ({}, ValueError, "at least one monitor"),
        ({"format": 2}, ValueError, "format 1, got format 2"),
    ],
    ids=["number", "module", "none", "empty", "format"],
)
def test_what_is_not_a_monitor_is_refused(monitor, error, text, tmp_path):
    for show in (lambda: gk.flow.report(monitor, tmp_path / "flow.html"), lambda: gk.flow.serve(monitor)):
        with pytest.raises(error, match=text):
            show()
    assert not list(tmp_path.iterdir())


def test_what_is_not_a_comparison_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"comparison: expected what gk.flow.compare returns, got list"):
        gk.flow.report(snapshot(), tmp_path / "flow.html", comparison=[1])


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"cannot be written to .*nowhere.*: there is no folder"):
        gk.flow.report(snapshot(), tmp_path / "nowhere" / "flow.html")
    with pytest.raises(IsADirectoryError):
        gk.flow.report(snapshot(), tmp_path)


def test_a_report_replaces_the_one_before(tmp_path):
    path = gk.flow.report(snapshot(20), tmp_path / "flow.html")
    gk.flow.report(snapshot(1, model="Other"), path)
    [run] = data_of(path)["runs"]
    assert run["model"] == "Other" and run["steps"] == [1] and path.read_text().rstrip().endswith("</html>")
