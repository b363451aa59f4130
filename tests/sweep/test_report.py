"""The report of a sweep: its table, and its page in a real browser, opened from disk."""

import csv
import json
import shutil

import numpy as np
import pytest

from dydilit_jax.sweeps import report
from dydilit_jax.sweeps.notation import Score
from dydilit_jax.sweeps.report import thinned, write_report
from dydilit_jax.sweeps.runs import load_sweep, open_sweep, write_json
from tests.sweep.fakes import finished_run
from tests.tiny import ROOT, plain_config

NASTY = "error: </script><b id=injected>no</b> & so on"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """The ladder's first and last runs, finished but for two."""
    workdir = tmp_path_factory.mktemp("ladder")
    file = load_sweep(str(ROOT / "configs/sweeps/ladder.py"), {})
    runs = file.runs()
    runs = runs[:3] + runs[-3:]
    open_sweep(workdir, file, runs, file.score)
    for seed, run in enumerate(runs[:4]):
        finished_run(workdir / run.name, run.config, seed)
    states = {runs[4].name: {"state": "failed", "error": NASTY}}
    write_json(workdir / "states.json", states)
    return workdir


def records(workdir, name):
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory):
    path, _ = write_report(sweep, tmp_path_factory.mktemp("report") / "ladder.html")
    return path


def test_the_table_has_the_fields_that_differ_and_the_scores_of_every_run(sweep, tmp_path):
    _, table = write_report(sweep, tmp_path / "out.html")
    rows = list(csv.DictReader(table.open()))
    assert [row["run"] for row in rows] == [
        *(f"1_relu-seed={seed}" for seed in range(3)),
        *(f"softmax-seed={seed}" for seed in range(3)),
    ]
    assert {name for name in rows[0] if "." in name or name == "seed"} == {
        "seed", "model.attention.kind", "model.attention.heads", "model.feedforward.kind",
    }  # fmt: skip
    for row in rows[:4]:
        *_, last, scores = records(sweep, row["run"])
        assert (row["state"], row["step"], row["steps"]) == ("finished", "1400", "1400")
        assert float(row["loss"]) == last["loss"]
        assert float(row["best pixel_frechet"]) == scores["pixel_frechet"]
        assert float(row["final label_agreement"]) == 0.9
    assert (rows[4]["state"], rows[4]["error"]) == ("failed", NASTY)
    assert (rows[5]["state"], rows[5]["loss"]) == ("waiting", "")


def test_any_folder_of_runs_can_be_reported_and_more_may_be_better(tmp_path):
    for seed in range(2):
        finished_run(tmp_path / f"run{seed}", plain_config(seed=seed, train={"steps": 100}), seed)
    _, table = write_report(tmp_path, tmp_path / "out.html", Score("gradient_norm", maximize=True))
    for row in csv.DictReader(table.open()):
        norms = [each.get("gradient_norm", 0) for each in records(tmp_path, row["run"])]
        assert float(row["best gradient_norm"]) == max(norms)


def test_long_curves_are_thinned_and_keep_their_end(monkeypatch):
    monkeypatch.setattr(report, "MOST_POINTS", 10)
    curve = [(step, float(step)) for step in range(1, 96)]
    kept = thinned(curve)
    assert kept[-1] == curve[-1]
    assert len(kept) == 10
    assert np.ptp(np.diff([step for step, _ in kept])) == 0
    assert thinned(curve[:10]) == curve[:10]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-dev-shm-usage",
        f"--user-data-dir={profile}", "--window-size=1300,1000",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.chrome.service.Service(driver)
    with webdriver.Chrome(options=options, service=service) as window:
        yield window


@pytest.fixture(scope="module")
def opened(browser, page):
    """The page in the browser, and every address that was asked for since."""
    browser.get("about:blank")
    for log in ("performance", "browser"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def js(browser, script, *arguments):
    return browser.execute_script("return " + script, *arguments)


def test_the_page_asks_for_nothing_and_complains_of_nothing(opened, page):
    asked = []
    for entry in opened.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            asked.append(message["params"]["request"]["url"])
    assert page.as_uri() in asked
    assert all(url == page.as_uri() or url.startswith("data:") for url in asked)
    assert opened.get_log("browser") == []
    assert js(opened, "document.getElementById('injected')") is None
    assert NASTY in js(opened, "document.getElementById('runs').textContent")
    sizes = js(opened, "[...document.querySelectorAll('figure img')].map(i => i.naturalWidth)")
    assert sizes == [40] * 4  # Four grids, decoded.
    # The page's policy would stop a request even if one were tried.
    opened.execute_script("new Image().src = 'http://localhost:9/x.png'")
    messages = [entry["message"] for entry in opened.get_log("browser")]
    assert any("Content Security Policy" in message for message in messages)


def names_in_table(browser):
    script = "[...document.querySelectorAll('#runs tbody tr')].map(row => row.dataset.run)"
    return js(browser, script)


def test_rows_are_sorted_by_a_click_and_filtered(opened, sweep):
    scores = {
        name: records(sweep, name)[-1]["pixel_frechet"] for name in names_in_table(opened)[:4]
    }
    ascending = sorted(scores, key=lambda name: scores[name])
    script = "[...document.querySelectorAll('#runs thead button')].find(b => b.textContent === {})"
    button = js(opened, script.format("'best pixel_frechet'"))
    button.click()
    assert names_in_table(opened)[:4] == ascending
    assert js(opened, "arguments[0].parentNode.getAttribute('aria-sort')", button) == "ascending"
    button.click()
    assert names_in_table(opened)[:4] == ascending[::-1]  # Those without a score stay last.
    assert js(opened, "document.querySelector('#runs tr.best').dataset.run") == ascending[0]
    field = opened.find_element("id", "filter")
    field.send_keys("softmax failed")
    assert names_in_table(opened) == ["softmax-seed=1"]
    field.clear()
    field.send_keys(" ")
    assert len(names_in_table(opened)) == 6


@pytest.mark.parametrize("logarithmic", [False, True])
def test_curves_have_the_datas_points_in_their_places(opened, sweep, logarithmic):
    box = opened.find_element("css selector", "#curves input[type=checkbox]")
    if box.is_selected() != logarithmic:
        box.click()
    script = """[...document.querySelectorAll('#curves [data-metric=loss] g')].map(g => [
        g.dataset.run, g.querySelector('path').getAttribute('d'), [...g.querySelectorAll('circle')]
        .map(c => [c.dataset.step, c.dataset.value, c.cx.baseVal.value, c.cy.baseVal.value]
        .map(Number))])"""
    curves = js(opened, script)
    assert len(curves) == 4
    drawn = []
    for name, path, points in curves:
        expected = [[each["step"], each["loss"]] for each in records(sweep, name) if "loss" in each]
        np.testing.assert_array_equal(np.array(points)[:, :2], expected)
        corners = [pair.split(",") for pair in path.lstrip("M").split("L")]
        np.testing.assert_allclose(np.array(corners, float), np.array(points)[:, 2:], atol=0.01)
        drawn += points
    steps, losses, x, y = np.array(drawn).T
    heights = np.log(losses) if logarithmic else losses
    # One straight line of all runs takes values to places, upwards and to the right.
    for values, places, sign in ((steps, x, 1), (heights, y, -1)):
        slope, start = np.polyfit(values, places, 1)
        assert np.sign(slope) == sign
        np.testing.assert_allclose(slope * values + start, places, atol=0.02)


def test_fields_stand_against_the_score_and_a_hidden_run_is_gone(opened, sweep):
    points = "[...document.querySelectorAll('[data-scatter] circle')].map(c => c.dataset.run)"
    lines = "[...document.querySelectorAll('[data-parallel] polyline')].map(c => c.dataset.run)"
    scored = [f"1_relu-seed={seed}" for seed in range(3)] + ["softmax-seed=0"]
    assert js(opened, points) == scored * 2
    assert js(opened, lines) == scored
    y = js(
        opened,
        "[...document.querySelectorAll('[data-scatter] circle')].map(c => c.cy.baseVal.value)",
    )
    values = [records(sweep, name)[-1]["pixel_frechet"] for name in scored]
    assert np.corrcoef(y[:4], values)[0, 1] == pytest.approx(-1, abs=1e-4)
    means = js(opened, "[...document.querySelectorAll('#seeds tbody td')].map(c => c.textContent)")
    expected = {f"{np.mean(values[:3]):.4g}", f"{np.std(values[:3], ddof=1):.4g}"}
    assert expected <= set(means)
    box = opened.find_element("css selector", "#runs tr[data-run='1_relu-seed=1'] input")
    box.click()
    assert js(opened, lines) == [name for name in scored if name != "1_relu-seed=1"]
    script = "document.querySelectorAll('#curves [data-metric=loss] g').length"
    assert js(opened, script) == 3
    box.click()


def test_light_and_dark_have_grounds_of_their_own_and_text_that_can_be_read(opened):
    def luminance(colour):
        red, green, blue = (
            (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4)
            for c in (int(part) / 255 for part in colour[4:-1].split(","))
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    grounds = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        ground, ink = (
            luminance(js(opened, f"getComputedStyle(document.body).{name}"))
            for name in ("backgroundColor", "color")
        )
        grounds.append(ground)
        assert (max(ground, ink) + 0.05) / (min(ground, ink) + 0.05) > 7  # WCAG's AAA
    assert grounds[0] > 0.8
    assert grounds[1] < 0.05
