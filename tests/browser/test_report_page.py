"""The page of owt report in a real browser: drawn from metrics.jsonl, on any screen, without a fault."""

import json

import pytest
from written_runs import WrittenRun, eventful_run

from horovod_owt.report.render import page
from horovod_owt.report.summary import summarize_all

DESKTOP, PHONE = 1280, 390
HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"
# the y of each point of the first line of a chart, from its pixels and the axis
READ_LINE = """
(() => {
  const figure = document.querySelector("figure[data-chart=NAME]");
  const ticks = [...figure.querySelectorAll("text[text-anchor=end]")]
    .filter((text) => text.getAttribute("x") < 70)
    .map((text) => [Number(text.getAttribute("y")) - 4, parseFloat(text.textContent.replace(",", ""))]);
  const [[y0, v0], [y1, v1]] = [ticks[0], ticks[ticks.length - 1]];
  return [...figure.querySelectorAll("path.line")].flatMap((path) =>
    path.getAttribute("d").slice(1).split(/[ML]/).map((point) => {
      const [x, y] = point.split(",").map(Number);
      return v0 + (y - y0) * (v1 - v0) / (y1 - y0);
    }));
})()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs: one that has seen everything, one with a gradient norm that was stopped, a hybrid one."""
    root = tmp_path_factory.mktemp("runs")
    eventful_run(root / "eventful")
    second = WrittenRun(root / "clipped", seed=1, clip_norm=1.0)
    second.start(["node1"] * 4)
    for grad_norm in (3.0, 1.5, 1.0):
        second.steps(40, grad_norm=grad_norm)
    second.outcome(75, "stopped by SIGUSR1 to rank 0 on node1 after step 120")
    third = WrittenRun(root / "hybrid", seed=2, parallel="hybrid", fc_group_size=2)
    third.start([HOSTILE] * 2)
    third.steps(3)
    third.write("fault", fault=HOSTILE, step=3)
    return [root / name for name in ("eventful", "clipped", "hybrid")]


@pytest.fixture
def opened(browser, tmp_path):
    """Open the page of these runs; afterwards nothing may have gone wrong in it."""

    def opened(*folders, points=1200):
        file = tmp_path / "report.html"
        file.write_text(page(summarize_all(folders, max_points=points), max_points=points, folder=tmp_path))
        browser.faults.clear()
        browser.show_as(DESKTOP)
        browser.open(file)
        return browser

    yield opened
    assert browser.faults == []


def steps_of(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record for record in records if record["kind"] == "step"}


def test_a_curve_is_drawn_where_the_records_put_it(opened, runs):
    browser = opened(runs[0])
    wanted = [record["loss"] for _, record in sorted(steps_of(runs[0]).items())]
    assert browser.value(READ_LINE.replace("NAME", "loss")) == pytest.approx(wanted, abs=0.02)
    assert len(browser.value(READ_LINE.replace("NAME", "throughput"))) == 320  # lost work is drawn, too


def test_a_point_is_read_by_keys(opened, runs):
    browser = opened(runs[0])
    loss = "document.querySelector('figure[data-chart=loss] .readout').textContent"
    browser.value("document.querySelector('figure[data-chart=loss] svg').focus()")
    browser.press("Home")
    for _ in range(3):
        browser.press("ArrowRight")
    shown = browser.value(loss)
    assert shown.startswith("step 4 · loss ")
    assert float(shown.split()[-1]) == pytest.approx(steps_of(runs[0])[4]["loss"], rel=1e-4)
    browser.press("ArrowRight", shift=True)
    assert browser.value(loss).startswith("step 14 ")
    browser.press("End")
    assert browser.value(loss).startswith("step 300 ")
    browser.press("Escape")
    assert browser.value(loss) == ""
    browser.value("document.querySelector('figure[data-chart=throughput] svg').focus()")
    browser.press("ArrowDown")
    browser.press("ArrowDown")
    said = browser.value("document.querySelector('figure[data-chart=throughput] .readout').textContent")
    assert "fault: stalled: rank 3 on node2" in said


def test_tab_reaches_links_controls_charts_and_tables_in_order(opened, runs):
    browser = opened(runs[0])
    seen = []
    browser.value("document.querySelector('nav a').focus()")
    seen.append("A")
    active = "(e => e.closest('figure')?.dataset.chart ?? e.name ?? e.tagName)(document.activeElement)"
    while not seen or seen[-1] != "BODY":  # once around
        browser.press("Tab")
        seen.append(browser.value(active))
        outline = browser.value("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or seen[-1] == "BODY", seen
        assert len(seen) < 60
    wanted = ["A", "x", "log", "loss", "accuracy", "lr", "throughput", "SUMMARY"]
    assert [name for name in dict.fromkeys(seen) if name in wanted] == wanted


def test_the_axis_and_the_runs_can_be_chosen(opened, runs):
    browser = opened(*runs)
    lines = "document.querySelectorAll('figure[data-chart=lr] path.line').length"
    assert browser.value(lines) == 4 + 1 + 1  # four kept stretches of the first run
    browser.value("document.querySelectorAll('input[name=run]')[0].click()")
    assert browser.value(lines) == 2
    browser.value("document.querySelector('input[name=x][value=epoch]').click()")
    browser.value("document.querySelector('figure[data-chart=lr] svg').focus()")
    browser.press("End")
    said = browser.value("document.querySelector('figure[data-chart=lr] .readout').textContent")
    assert said.startswith("epoch 2.4 · clipped ")


def test_a_hostile_run_folder_runs_no_script(opened, runs):
    browser = opened(runs[2])
    assert browser.value("document.title") == "hybrid"
    assert HOSTILE in browser.value("document.body.innerText")
    assert browser.value("document.images.length") == 0


def test_no_screen_is_too_narrow_and_no_text_too_faint(opened, runs):
    browser = opened(*runs)
    for width, phone in ((DESKTOP, False), (PHONE, True)):
        for dark in (False, True):
            browser.show_as(width, dark=dark, phone=phone)
            assert browser.value("document.documentElement.scrollWidth") == width
            faint = browser.value(FAINT)
            assert not faint, f"{width} px, dark={dark}"


# texts whose contrast to the page is below 4.5, WCAG 2.1 AA
FAINT = """
(() => {
  const parts = (text) => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
  const light = (text) => parts(text).map((p) => p / 255)
    .map((p) => (p <= 0.03928 ? p / 12.92 : ((p + 0.055) / 1.055) ** 2.4))
    .reduce((sum, p, i) => sum + p * [0.2126, 0.7152, 0.0722][i], 0);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const found = new Set();
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element), svg = element.namespaceURI.endsWith("svg");
    const ink = light(svg ? style.fill : style.color);
    const contrast = (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
    if (contrast < 4.5 && style.display !== "none") found.add(`${element.className} ${contrast.toFixed(1)}`);
  }
  return [...found];
})()
"""


def test_a_page_in_points_reads_as_fast(opened, runs):
    browser = opened(*runs, points=50)
    text = browser.value("document.getElementById('training').innerText")
    assert "Each point is the mean of 7 steps" in text
    assert browser.value("document.querySelectorAll('figure[data-chart=loss] path.band').length") > 0
    browser.value("document.querySelector('figure[data-chart=loss] svg').focus()")
    browser.press("Home")
    said = browser.value("document.querySelector('figure[data-chart=loss] .readout').textContent")
    low, high = said.split("eventful ")[1].split("(")[1].split(")")[0].split(" to ")
    losses = [steps_of(runs[0])[step]["loss"] for step in range(1, 8)]
    assert (float(low), float(high)) == pytest.approx((min(losses), max(losses)), rel=1e-4)
