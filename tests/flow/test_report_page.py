"""The page in a browser: what it shows is what the monitor saw, it asks nothing of any network, and it can be worked with."""

import contextlib
import math
import re
import sys
import threading
from importlib import resources

import numpy as np
import pytest
import torch
from playwright.sync_api import expect, sync_playwright

import gradkernels as gk
from tests.flow.made_up import Run, alert, chromium, layer, row, snapshot, spectrum

ROWS = {"h": 0, "c": 1, "x": 2}  # as made up: each a little below the one before
DARK, LIGHT = "rgb(20, 23, 27)", "rgb(251, 251, 249)"


@pytest.fixture(scope="module")
def browser():
    expect.set_options(timeout=20_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium())
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """visit(what a report takes, or an address) gives the page; whatever it complained about or asked for is checked in the end."""
    contexts, complaints, asked, homes = [], [], [], ["data:"]

    def visit(source, comparison=None, width=1200, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        # the remark on reading pixels is about these tests, which do
        page.on("console", lambda m: "getImageData" in m.text or complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        # what nobody threw, as of observers whose work is not done within a frame
        page.add_init_script("addEventListener('error', (event) => console.log(event.message))")
        page.on("request", lambda request: asked.append(request.url))
        if not isinstance(source, str):
            source = gk.flow.report(source, tmp_path / "flow.html", comparison=comparison).as_uri()
        page.goto(source)
        page.wait_for_selector("html[data-ready]", state="attached")
        homes.append(source.partition("?")[0])
        page.complaints = complaints
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not complaints and asked and all(url.startswith(tuple(homes)) for url in asked), (complaints, asked)


def readout(page, layer="encoder.l0"):
    """(training step, time step, value) of a layer's heatmap."""
    data = page.locator(f'.panel[data-layer="{layer}"] .readout').evaluate("e => ({...e.dataset})")
    return tuple(float(data[key]) if data[key] else None for key in ("step", "time", "value"))


def shown(page, layer="encoder.l0"):
    """The table of a layer's values: what is written for each time step."""
    panel = page.locator(f'.panel[data-layer="{layer}"]')
    if panel.locator("details").get_attribute("open") is None:
        panel.locator("summary").click()
        panel.locator("tbody tr").first.wait_for()
    return panel.locator("tbody td").all_text_contents()


def written(log10):
    """A norm as the page writes it."""
    if log10 is None:
        return "none"
    if -3 <= log10 < 4:
        digits = 3 - 1 - math.floor(log10)
        return f"{10**log10:.{digits}f}" if log10 < 2 else f"{10**log10:.3g}"
    power = math.floor(log10)
    return f"{10 ** (log10 - power):.2f}e{power}"


def pixel(page, step, time, layer="encoder.l0", steps=5, T=7):
    """The colour in the middle of the cell of the i-th step and a time step."""
    canvas = page.locator(f'.panel[data-layer="{layer}"] .plot.map > canvas')
    script = "(c, [x, y]) => [...c.getContext('2d').getImageData(x * c.width, y * c.height, 1, 1).data]"
    return tuple(canvas.evaluate(script, [(step + 0.5) / steps, 1 - (time + 0.5) / T]))


def set_slider(locator, value):
    locator.evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})) }", value)


# ------ norms


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_values_are_those_of_the_snapshot(visit, direction):
    page = visit(snapshot(layers=[layer(direction=direction, rate=7.0)]))
    name = "encoder.l0" if direction == "forward" else "encoder.l0 reverse"
    for signal, offset in ROWS.items():
        page.select_option("#signal", signal)
        expected = row(7, 4 + offset, 7.0, direction == "reverse")
        assert None in row(8, 4, 7.0) and shown(page, name) == [written(v) for v in expected]
        # where the gradient gets to last
        at = 6 if direction == "reverse" else 0
        assert readout(page, name) == (5, at, np.float32(expected[at]))


def test_a_real_run_is_shown_as_it_was(visit):
    model = gk.nn.LSTM(3, 8, num_layers=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with gk.flow.watch(model, spectra=2, on_alert=lambda alert: None) as monitor:
        for _ in range(4):
            model(torch.randn(12, 2, 3))[0][-1].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    page = visit(monitor)
    for name in monitor.layers:
        for state, signal in enumerate("hc"):
            page.select_option("#signal", signal)
            [expected] = [one["signals"][signal][-1] for one in monitor.snapshot()["layers"] if one["name"] == name]
            assert shown(page, name) == [written(v) for v in expected]
            assert readout(page, name)[2] == pytest.approx(monitor.log10_norms(name, state)[0].item(), abs=1e-4)
        cells = page.locator(f'#overview tr:has(th:text-is("{name}")) td').all_text_contents()
        assert cells[:2] == ["lstm", f"{monitor.horizon(name)} of 11 steps"]
    last = monitor.snapshot()["spectra"][-1]
    page.select_option("#spectra select", last["name"])
    assert float(page.locator("#spectra .readout").get_attribute("data-radius")) == pytest.approx(last["radius"])
    assert page.locator(".eigenvalues circle").count() == 8
    assert page.locator("#model").text_content() == "LSTM"


def test_colours_run_from_the_least_to_the_greatest(visit):
    # from 1e-1 at the end to 1e-7: what a colour stands for is rounded to whole powers
    rows = [[-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0]] * 4 + [None]
    page = visit(snapshot(layers=[layer(signals={"h": rows})]))
    assert pixel(page, 0, 6) == (250, 232, 80, 255) and pixel(page, 3, 0) == (18, 10, 64, 255)
    light = [sum(pixel(page, 1, t)[:3]) for t in range(7)]
    assert light == sorted(set(light))
    assert pixel(page, 4, 3)[3] < 255  # striped: not measured


def test_relative_to_the_end(visit):
    page = visit(snapshot())
    page.check("#relative")
    assert readout(page) == (5, 0, pytest.approx(-3.0)) and shown(page)[-1] == "1.00"
    assert "of that at the end" in page.locator(".panel .readout").text_content()


def test_relative_to_where_the_gradient_comes_in(visit):
    """A loss in the middle of a sequence: what follows has no gradient."""
    signals = {"h": [[-4.0, -3.0, -2.0, None, None]]}
    page = visit(snapshot(1, layers=[layer(T=5, signals=signals, saturation={}, horizon=[2], decay=[1.0])]))
    page.check("#relative")
    assert shown(page) == ["0.0100", "0.100", "1.00", "none", "none"]
    assert page.locator("#overview td").all_text_contents()[2] == "× 0.1 a step"


def test_saturation_stays_until_it_is_measured_again(visit):
    page = visit(snapshot())
    page.select_option("#signal", "gate i")
    for step in (1, 3, 4, 5):
        set_slider(page.locator("#step"), step - 1)
        assert readout(page) == (step, 0, 0.25) and shown(page) == ["25 %"] * 7


def test_torchs_own_layers_show_the_gradient_of_their_input(visit):
    plain = layer(
        "decoder.l0", kind="input", cell=None, signals={"x": [row(7, i, 0.5) for i in range(5)]}, saturation={}
    )
    page = visit(snapshot(layers=[layer(), plain]))
    panel = page.locator('.panel[data-layer="decoder.l0"]')
    assert panel.get_attribute("data-signal") == "x" and "torch's own layer" in panel.locator(".note").text_content()
    page.select_option("#signal", "gate i")
    assert "not measured for this layer" in panel.locator(".readout").text_content()


def test_sequences_of_many_lengths(visit):
    signals = {"h": [row(T, 0, 0.5) for T in (7, 3, 1)]}
    page = visit(snapshot(3, layers=[layer(steps=3, signals=signals, saturation={})]))
    assert readout(page) == (3, 0, -1.0) and shown(page) == ["0.100"]
    assert pixel(page, 2, 3, steps=3)[3] == 0 and pixel(page, 0, 3, steps=3)[3] == 255


@pytest.mark.parametrize(
    "given",
    [
        snapshot(0, layers=[]),
        snapshot(0),
        snapshot(1, layers=[layer(steps=1, T=1)]),
        snapshot(2, layers=[layer(steps=2, signals={"h": [[None] * 7] * 2})]),
        snapshot(nonfinite={"layer": "encoder.l0", "step": 3, "time_step": None}, clip_rate=0.5),
        {"format": 1, "model": "M", "every": 1, "step": 0, "steps": [], "layers": []},
    ],
    ids=["no layer", "no step", "one of one", "no gradient", "broken", "least"],
)
def test_odd_runs_are_shown_too(visit, given):
    page = visit(given)
    if given.get("nonfinite"):
        assert "First NaN or Inf: layer encoder.l0, training step 3" in page.locator("#overview").text_content()
        assert "clipped in 50 %" in page.locator("#overview").text_content()
    for signal in page.locator("#signal option").evaluate_all("all => all.map(o => o.value)"):
        page.select_option("#signal", signal)
    page.check("#relative", force=True) if page.locator("#relative").is_enabled() else None


# ------ looking around


def test_heatmap_by_keyboard(visit):
    page = visit(snapshot())
    plot = page.locator(".plot.map")
    plot.focus()
    for key in ("ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert readout(page) == (3, 2, pytest.approx(row(7, 2, 0.5)[2]))
    assert page.locator("#step-shown").text_content() == "3"
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    assert readout(page)[:2] == (1, 6)
    page.keyboard.press("End")
    page.keyboard.press("PageDown")
    assert readout(page)[:2] == (5, 0)


def test_everything_can_be_reached_by_tab(visit):
    page = visit(snapshot(spectra=[spectrum(1), spectrum(3)], alerts=[alert()]))
    wanted = page.locator(
        "a[href]:visible, button:visible, select:visible, input:visible:enabled, summary:visible"
    ).count()
    seen = set()
    for _ in range(wanted + 40):
        page.keyboard.press("Tab")
        seen.add(
            page.evaluate(
                "() => { const all = [...document.querySelectorAll('*')]; return all.indexOf(document.activeElement) }"
            )
        )
    assert len(seen) >= wanted
    unnamed = "e => !(e.textContent.trim() || e.getAttribute('aria-label') || e.labels?.length)"
    assert not page.locator("a, button, select, input, summary").evaluate_all(f"all => all.filter({unnamed}).length")


def test_heatmap_by_pointer(visit):
    page = visit(snapshot())
    box = page.locator(".plot.map > canvas").bounding_box()
    x, y = box["x"] + box["width"] * 0.3, box["y"] + box["height"] * (1 - 4.5 / 7)
    page.mouse.move(x, y)
    assert readout(page)[:2] == (2, 4) and page.locator("#step-shown").text_content() == "5"
    page.mouse.click(x, y)
    page.mouse.move(5, 5)
    assert (
        readout(page) == (2, 4, pytest.approx(row(7, 1, 0.5)[4])) and page.locator("#step-shown").text_content() == "2"
    )


def test_slider_over_training(visit):
    page = visit(snapshot(every=3))
    profile = page.locator("#profiles path.line")
    before = profile.get_attribute("d")
    set_slider(page.locator("#step"), 1)
    assert readout(page) == (4, 0, pytest.approx(row(7, 1, 0.5)[0])) and profile.get_attribute("d") != before
    assert "At training step 4" in page.locator("#overview").text_content()


def test_spectra_have_a_slider(visit):
    names = ("encoder.l0.i", "encoder.l0.f")
    given = [spectrum(step, name, 0.3 * step) for step in (1, 3, 5) for name in names]
    page = visit(snapshot(spectra=given))
    assert page.locator("#spectra select option").all_text_contents() == list(names)
    slider = page.locator("#spectra input[type=range]")
    for at, step in enumerate((1, 3, 5)):
        set_slider(slider, at)
        data = page.locator("#spectra .readout").evaluate("e => ({...e.dataset})")
        assert data == {"step": str(step), "radius": str(0.3 * step), "norm": str(1.5 * (0.3 * step))}
        values = page.locator(".eigenvalues circle").evaluate_all("all => all.map(c => [+c.dataset.re, +c.dataset.im])")
        expected = [[0.3 * step, 0], [0, 0.15 * step], [0, -0.15 * step]]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
        assert page.locator(".eigenvalues .outside").count() == (1 if 0.3 * step > 1 else 0)
    x, y, circle = (
        page.locator(f"#spectra {s}").first
        for s in (".eigenvalues circle", ".eigenvalues circle:nth-child(2)", ".unit")
    )
    right = [float(circle.get_attribute(k)) for k in ("cx", "rx")]
    assert float(x.get_attribute("cx")) == pytest.approx(right[0] + 1.5 * right[1], abs=0.02)
    assert float(y.get_attribute("cx")) == pytest.approx(right[0], abs=0.02)


def test_a_layer_without_a_decay_keeps_its_colour_and_says_so(visit):
    given = [layer("a.l0", decay=[None] * 5), layer("a.l0_reverse", direction="reverse"), layer("a.l1")]
    page = visit(snapshot(layers=given))
    key = "all => Object.fromEntries(all.map((p) => [p.dataset.series, p.getAttribute('class')]))"
    horizon, decay = (page.locator("#reach figure").nth(k).locator("path.line").evaluate_all(key) for k in range(2))
    assert list(horizon) == ["a.l0", "a.l0_reverse", "a.l1"] and list(decay) == ["a.l0_reverse", "a.l1"]
    assert horizon.items() >= decay.items() and decay["a.l0_reverse"] == "line hue1 dashed"
    assert "not to be seen" in page.locator("#overview tbody tr").first.text_content()


def test_alerts_lead_to_their_step(visit):
    markup = "<b>grows</b><script>alert(1)</script>"
    given = [alert(step=2, time_step=4), alert("exploding", step=4, time_step=None, message=markup, advice=None)]
    page = visit(snapshot(alerts=given))
    items = page.locator(".alerts li")
    assert items.count() == 2 and page.locator("#alerts svg circle").count() == 2
    assert markup in items.nth(0).text_content() and not page.locator(".alerts b").count()
    assert "Open the gates." in items.nth(1).text_content()
    items.nth(1).locator("button").click()
    assert readout(page)[:2] == (2, 4)
    page.locator("#alerts svg circle.exploding").click()
    assert readout(page)[:2] == (4, 4)


def test_blocks_and_parameters(visit):
    blocks = [
        {"name": "b0", "kind": "residual", "entrance": [-1.0] * 5, "exit": [-2.0] * 5, "residual_share": [0.7] * 5}
    ]
    sparse = [0.5, None, None, None, 0.1]
    parameters = [{"name": "head", "norm": sparse, "grad": sparse, "update_ratio": [None] * 5}]
    page = visit(snapshot(blocks=blocks, parameters=parameters))
    assert page.locator("#blocks .legend li").all_text_contents() == ["b0, entrance", "b0, exit", "b0"]
    # one line over the steps at which it was not measured, and none where it never was
    assert page.locator("#parameters path.line").evaluate_all(
        "all => all.map(p => p.getAttribute('d').split('L').length)"
    ) == [2]
    # over all of training, also where the last steps were not measured: then it says so, and the line ends before
    sparse = [0.5, None, 0.1, None, None]
    page = visit(snapshot(parameters=[{"name": "head", "norm": sparse, "grad": sparse, "update_ratio": sparse}]))
    ends = lambda chart: chart.evaluate("p => [0, p.getTotalLength()].map((s) => p.getPointAtLength(s).x)")
    cursor = page.locator("#parameters .cursor").first.evaluate("line => line.x1.baseVal.value")
    first, last = ends(page.locator("#parameters path.line").first)
    assert last == pytest.approx((first + cursor) / 2, abs=0.2)
    assert "lines end at the last of these" in " ".join(page.locator("#parameters .lead").text_content().split())
    page = visit(snapshot())
    for name in ("blocks", "parameters", "spectra", "comparison"):
        expect(page.locator(f"#{name}")).to_be_hidden()
        expect(page.locator(f'nav a[href="#{name}"]')).to_be_hidden()


def test_comparison(visit):
    make = {"rnn": lambda: torch.nn.RNN(3, 8), "lstm": lambda: gk.init.forget_bias_(torch.nn.LSTM(3, 8), 3.0)}
    found = gk.flow.compare(make, (5, 30), seeds=1, batch=2)
    page = visit(snapshot(), comparison=found)
    cells = page.locator('#comparison tr:has(th:text-is("rnn")) td').all_text_contents()
    assert cells == [
        written(found.curve("rnn", 5).ratio),
        written(found.curve("rnn", 30).ratio),
        str(found.horizon("rnn")),
    ]
    line = page.locator('#comparison path[data-series="lstm"]').first
    before = line.get_attribute("d")
    assert len(before.split("L")) == 30
    page.locator("#comparison select").first.select_option("5")
    assert len(page.locator('#comparison path[data-series="lstm"]').first.get_attribute("d").split("L")) == 5
    page.locator("#comparison select").nth(1).select_option("h")


def test_runs_side_by_side(visit):
    page = visit({"rnn": snapshot(3, layers=[layer(steps=3, rate=1.0)]), "lstm": snapshot(5)})
    names = ["rnn · encoder.l0", "lstm · encoder.l0"]
    assert page.locator(".panel").evaluate_all("all => all.map(p => p.dataset.layer)") == names
    assert page.locator("#profiles .legend li").all_text_contents() == names
    assert readout(page, names[0])[0] == 3 and readout(page, names[1])[0] == 5
    set_slider(page.locator("#step"), 1)
    assert readout(page, names[0]) == (2, 0, pytest.approx(row(7, 1, 1.0)[0]))


# ------ how it looks


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit, scheme):
    page = visit(snapshot(), color_scheme=scheme)
    colour = "() => getComputedStyle(document.body).backgroundColor"
    mine, other = (LIGHT, DARK) if scheme == "light" else (DARK, LIGHT)
    assert page.evaluate(colour) == mine
    page.click("#theme")
    assert page.evaluate(colour) == other
    page.reload()
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.evaluate(colour) == other
    page.click("#theme")
    assert page.evaluate(colour) == mine


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_is_wider_than_the_screen(visit, width):
    long = "encoder.layers.0.a_very_long_name_of_a_module.l0_reverse"
    page = visit(
        snapshot(layers=[layer(), layer(long)], alerts=[alert(layer=long)], spectra=[spectrum(1)]), width=width
    )
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    assert page.locator(".plot.map").first.bounding_box()["width"] > 0.75 * min(width, 480)


def test_figures_follow_the_width(visit):
    page = visit(snapshot())
    before = page.locator(".plot.map").bounding_box()["width"]
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function(
        "() => [...document.querySelectorAll('.plot.map')].every(p => p.clientWidth === +p.lastChild.getAttribute('width'))"
    )
    assert page.locator(".plot.map").bounding_box()["width"] < before


def test_print(visit):
    page = visit(snapshot(), color_scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    expect(page.locator(".bar").first).to_be_hidden()
    expect(page.locator(".plot.map")).to_be_visible()


def test_a_printer_gets_figures_that_fit(visit):
    page = visit(snapshot(alerts=[alert()]))
    widest = "() => Math.max(...[...document.querySelectorAll('.plot svg')].map(s => +s.getAttribute('width')))"
    before = page.evaluate(widest)
    # all of it before the event is over: nobody waits any longer
    fits = page.evaluate(f"() => {{ dispatchEvent(new Event('beforeprint')); return ({widest})() }}")
    assert fits < 44 * 16 < before
    page.evaluate("() => dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(widest) == before


# ------ lessons


def lesson(page, **settings):
    """The bars of the first lesson, log10 by time step."""
    box = page.locator("#lesson-rnn")
    sliders = {"T": "sequence length", "scale": "weight scale ‖W‖", "input": "size of the input"}
    for name, value in settings.items():
        if name in sliders:
            set_slider(box.get_by_label(sliders[name]), value)
        else:
            box.get_by_label(name).select_option(value)
    bars = box.locator("rect[data-time]").evaluate_all("all => all.map(b => b.dataset.value)")
    return [float(v) if v else -math.inf for v in bars]


@pytest.mark.parametrize("scale", [0.8, 1.0, 1.2])
def test_lesson_without_input_is_the_theory(visit, scale):
    """Nothing saturates, and the matrix is orthogonal: every step multiplies by its norm."""
    page = visit(snapshot())
    bars = lesson(page, T=50, scale=scale, input=0)
    np.testing.assert_allclose(bars, [math.log10(scale) * (49 - t) for t in range(50)], atol=1e-9)
    kind = page.locator("#lesson-rnn .verdict").get_attribute("data-kind")
    assert kind == {0.8: "vanishing", 1.0: "healthy", 1.2: "exploding"}[scale]


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_lesson_is_below_its_bound(visit, activation):
    page = visit(snapshot())
    factor = 1.5 * (0.25 if activation == "sigmoid" else 1.0)
    for T in (1, 30):
        bars = lesson(page, T=T, scale=1.5, input=1, activation=activation)
        assert len(bars) == T and all(v <= math.log10(factor) * (T - 1 - t) + 1e-9 for t, v in enumerate(bars))
        assert bars[-1] == pytest.approx(0)
    numbers = dict(zip(*(page.locator(f"#lesson-rnn {tag}").all_text_contents() for tag in ("dt", "dd"))))
    assert numbers["at most a step: max φ′ · ‖W‖"] == f"{factor:.3g}" and numbers["spectral radius ρ(W)"] == "1.5"


def test_lesson_plays_backwards(visit):
    page = visit(snapshot())
    page.click("text=Play backwards")
    page.wait_for_function("() => document.querySelectorAll('#lesson-rnn rect[data-time]').length < 20")
    page.wait_for_function("() => document.querySelectorAll('#lesson-rnn rect[data-time]').length === 20")


def test_agreement_lesson(visit):
    page = visit(snapshot())
    box = page.locator("#lesson-agreement")
    strength = lambda: dict(
        box.locator("[data-model]").evaluate_all("all => all.map(e => [e.dataset.model, +e.dataset.value])")
    )
    near = strength()
    set_slider(box.get_by_role("slider", name="distance from subject to verb"), 40)
    set_slider(box.get_by_role("slider", name="forget bias"), 5)
    far = strength()
    assert box.locator(".word").count() == 42 and box.locator(".subject, .verb").all_text_contents() == ["keys", "are"]
    assert far["rnn"] < near["rnn"] - 4 and far["rnn"] < far["lstm"] < -6 < -1 < far["biased"]
    assert -1 < far["attention"] and abs(far["attention"] - near["attention"]) < 0.5


def run_network(page, body):
    """Runs JavaScript that uses the lessons' networks."""
    source = (resources.files("gradkernels.flow") / "page" / "network.js").read_text()
    return page.evaluate(f"() => {{ {source}\n{body} }}")


def matrices(parts):
    return [
        torch.tensor([list(r.values()) if isinstance(r, dict) else r for r in p], dtype=torch.double) for p in parts
    ]


T = 9
DRAW = f"""
const plain = (m) => m.map((row) => [...row]);
const random = generator(7);
const inputs = Array.from({{length: {T}}}, () => vector(WIDTH, () => gaussian(random)));
"""


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "relu"])
def test_simple_network_is_differentiated_as_by_autograd(visit, activation):
    found = run_network(
        visit(snapshot()),
        f"""{DRAW} const w = scaled(uniform(WIDTH, WIDTH, generator(1)), 2);
        const {{norms, slope}} = rnnNorms(w, inputs, "{activation}", generator(3));
        const again = generator(3), g = vector(WIDTH, () => gaussian(again));
        return {{w: plain(w), x: plain(inputs), g: [...g], norms, slope}};""",
    )
    w, x = (torch.tensor(found[k], dtype=torch.double) for k in "wx")
    h, states = torch.zeros(32, dtype=torch.double, requires_grad=True), []
    for k in range(T):
        h = getattr(torch, activation)(w @ h + x[k])
        h.retain_grad()
        states.append(h)
    g = torch.tensor(found["g"], dtype=torch.double)
    h.backward(g / g.norm())
    np.testing.assert_allclose(found["norms"], [s.grad.norm().item() for s in states], rtol=1e-9)


def test_lstm_is_differentiated_as_by_autograd(visit):
    found = run_network(
        visit(snapshot()),
        f"""{DRAW} const norms = lstmNorms(inputs, 1.5, generator(3));
        const again = generator(3);
        const draws = Array.from({{length: 8}}, () => plain(uniform(WIDTH, WIDTH, again)));
        return {{w: draws.slice(0, 4).flat(), u: draws.slice(4).flat(), g: [...vector(WIDTH, () => gaussian(again))],
          x: plain(inputs), norms}};""",
    )
    w, u, x, g = (torch.tensor(found[k], dtype=torch.double) for k in "wuxg")
    h, c, states = torch.zeros(32, dtype=torch.double, requires_grad=True), torch.zeros(32, dtype=torch.double), []
    for k in range(T):
        i, f, z, o = (w @ h + u @ x[k]).chunk(4)
        c = (f + 1.5).sigmoid() * c + i.sigmoid() * z.tanh()
        h = o.sigmoid() * c.tanh()
        h.retain_grad(), c.retain_grad()
        states.append((h, c))
    h.backward(g)
    expected = [math.hypot(*(s.grad.norm().item() for s in pair)) for pair in states]
    np.testing.assert_allclose(found["norms"], expected, rtol=1e-9)


def test_attention_is_differentiated_as_by_autograd(visit):
    found = run_network(
        visit(snapshot()),
        f"""{DRAW} const norms = attentionNorms(inputs, generator(3));
        const again = generator(3);
        const parts = Array.from({{length: 3}}, () => plain(uniform(WIDTH, WIDTH, again)));
        return {{parts, g: [...vector(WIDTH, () => gaussian(again))], x: plain(inputs), norms}};""",
    )
    query, key, value = (torch.tensor(p, dtype=torch.double) for p in found["parts"])
    x = torch.tensor(found["x"], dtype=torch.double, requires_grad=True)
    q = query @ x[-1].detach()
    context = torch.softmax(x @ key.T @ q / 32**0.5, 0) @ (x @ value.T)
    context.backward(torch.tensor(found["g"], dtype=torch.double))
    np.testing.assert_allclose(found["norms"], x.grad.norm(dim=1), rtol=1e-9)


def test_norm_and_radius_of_a_matrix(visit):
    found = run_network(
        visit(snapshot()),
        """const w = uniform(WIDTH, WIDTH, generator(5)), q = orthogonal(WIDTH, generator(6));
        return {w: w.map((r) => [...r]), q: q.map((r) => [...r]), norm: spectralNorm(w), radius: spectralRadius(w)};""",
    )
    w, q = (np.array(found[k]) for k in "wq")
    np.testing.assert_allclose(q @ q.T, np.eye(32), atol=1e-12)
    assert found["norm"] == pytest.approx(np.linalg.norm(w, 2), rel=1e-4)
    assert found["radius"] == pytest.approx(abs(np.linalg.eigvals(w)).max(), rel=1e-3)


# ------ live


@pytest.fixture
def fast(monkeypatch):
    """A page that asks ten times a second, of a server that always looks."""
    module = sys.modules["gradkernels.flow.serve"]
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "POLL_MILLISECONDS", 100)


def test_live_page_follows_the_training(visit, fast):
    run = Run(3, spectra=[spectrum(1)])
    with gk.flow.serve(run) as server:
        page = visit(server.url)
        assert readout(page)[0] == 3
        run.steps, run.other["spectra"], run.other["alerts"] = 5, [spectrum(1), spectrum(5, size=0.9)], [alert(step=4)]
        expect(page.locator("#step-shown")).to_have_text("5")
        assert readout(page) == (5, 0, pytest.approx(row(7, 4, 0.5)[0]))
        assert page.locator("#spectra .readout").get_attribute("data-step") == "5"
        assert page.locator(".alerts li").count() == 1 and "5 recorded" in page.locator("#about").text_content()
        # who looks at an earlier step is left there
        set_slider(page.locator("#step"), 1)
        run.steps = 9
        expect(page.locator("#about")).to_contain_text("9 recorded")
        assert page.locator("#step-shown").text_content() == "2"
        assert readout(page) == (2, 0, pytest.approx(row(7, 1, 0.5)[0]))
        expect(page.locator("#status")).to_have_attribute("data-kind", "live")
        with page.expect_download() as download:
            page.click("#save")
        assert download.value.suggested_filename == "gradient-flow.html"
        page.close()


def test_live_page_of_steps_that_were_forgotten(visit, fast):
    """A monitor that keeps few steps, and has no longer what a page has last seen."""
    run = Run(3)
    with gk.flow.serve(run) as server:
        page = visit(server.url)
        run.other["every"] = 2
        run.other["layers"] = [layer(steps=4)]
        run.steps = 4  # steps 1 3 5 7
        expect(page.locator("#step-shown")).to_have_text("7")
        set_slider(page.locator("#step"), 2)
        assert readout(page) == (5, 0, pytest.approx(row(7, 2, 0.5)[0]))
        page.close()


def test_live_page_finds_its_server_again(visit, fast):
    run = Run(3)
    server = gk.flow.serve(run)
    page = visit(server.url)
    server.close()
    status = page.locator("#status")
    expect(status).to_have_attribute("data-kind", "lost")
    expect(status).to_contain_text("asking again")
    again = gk.flow.serve(run, port=server.port)
    expect(status).to_contain_text("another run has this address now")
    again.token = server.token
    run.steps = 8
    expect(page.locator("#step-shown")).to_have_text("8")
    expect(status).to_have_attribute("data-kind", "live")
    page.close()
    again.close()
    # the browser itself says that there was no answer
    refused = [text for text in page.complaints if re.search(r"net::ERR_|status of 403", text)]
    assert page.complaints == refused
    page.complaints.clear()


def test_training_does_not_notice_a_browser(visit, fast):
    """A model trains, a page follows; the page goes away in the middle, and training ends as if it had never been."""

    def train(watch):
        torch.manual_seed(0)
        model = gk.nn.RNN(3, 8)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with gk.flow.watch(model, on_alert=lambda alert: None) as monitor, watch(monitor) as server:
            page = visit(server.url) if server else None
            for step in range(60):
                model(torch.randn(9, 2, 3))[0].square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                if page and step == 20:
                    expect(page.locator("#step-shown")).to_have_text("21")
                if page and step == 40:
                    page.close()
        return model.weight_hh_l0.detach()

    threads = threading.active_count()
    assert torch.equal(train(gk.flow.serve), train(lambda monitor: contextlib.nullcontext()))
    assert threading.active_count() <= threads + 1
