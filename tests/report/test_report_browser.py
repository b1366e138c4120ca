"""The page in a real browser: it draws, answers clicks, and asks for nothing; no run can take it over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gymnasium import spaces
from headless import Browser, Page, find_chromium, running_chromium
from made_runs import TIMINGS, a_timeline, played, write_run

from rollout.report import write_report
from rollout.report.trees import Limits
from rollout.types import Failure

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    '"><svg onload="window.pwned = 1">',
    "<a href='http://127.0.0.1:9/'>click</a> <b>bold</b>",
    "]]>--><!-- ${window.pwned = 1} {{pwned}} %{x} &lt;script&gt;",
    "javascript:window.pwned=1",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("chromium is not installed; run: apt-get install chromium")
    with running_chromium(program) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.page() as page:
        yield page


def assert_clean(page: Page, path: Path) -> None:
    """It drew without an error, and asked for nothing but itself."""
    assert page.troubles == []
    assert page.requests == [path.resolve().as_uri()]


def chart_ids(page: Page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.chart')].map((chart) => chart.id)")


def choose(page: Page, episode: int, step: int) -> None:
    page.evaluate(
        f"""(() => {{
          const picker = document.getElementById('episode');
          picker.value = '{episode}';
          picker.dispatchEvent(new Event('change'));
          const slider = document.getElementById('step');
          slider.value = '{step}';
          slider.dispatchEvent(new Event('input'));
        }})()"""
    )


def text_of(page: Page, selector: str) -> str:
    return page.evaluate(f"document.querySelector({selector!r}).textContent")


def test_every_chart_is_drawn(page: Page, tmp_path: Path) -> None:
    lost = Failure("the guest did not answer", "guest", True)
    episodes = [
        played("run", i, return_=float(i % 2), length=3 + i, failure=lost if i == 2 else None)
        for i in range(5)
    ]
    path = write_report(write_run(tmp_path / "run", episodes, timings=TIMINGS, metrics=a_timeline(30)))
    assert page.open(path) == "true"
    assert_clean(page, path)
    names = [
        "returns",
        "distribution",
        "phases",
        "lengths",
        "live",
        "checkpoints",
        "rate",
        "bytes",
        "failures",
    ]
    assert chart_ids(page) == [f"chart-{name}" for name in names]
    shapes = page.evaluate(
        "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelectorAll("
        "'.trace path.js-line, .point path, path.point').length)"
    )
    assert all(count > 0 for count in shapes), dict(zip(names, shapes, strict=True))
    sizes = page.evaluate(
        "[...document.querySelectorAll('.chart .main-svg')].map((svg) => svg.getBoundingClientRect().width)"
    )
    assert min(sizes) > 100
    picture = page.screenshot()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 50_000  # an empty page of this size is below 20,000


def test_the_tree_of_any_move_can_be_chosen(page: Page, tmp_path: Path) -> None:
    episodes = [played("run", i, length=3, simulations=6 + i) for i in range(3)]
    path = write_report(write_run(tmp_path / "run", episodes))
    assert page.open(path) == "true"
    for index, trajectory in enumerate(episodes):
        for t in range(3):
            choose(page, index, t)
            nodes = [node for node in trajectory.nodes if node.t == t]
            drawn = page.evaluate("document.getElementById('tree').data[0].ids.length")
            assert drawn == len(nodes) == 7 + index
            shown = page.evaluate("document.querySelectorAll('#tree g.slice').length")
            assert shown == len(nodes)
            step = trajectory.steps[t]
            assert text_of(page, "#observation") == str(step.observation)
            assert text_of(page, "#choices tr.played td") == str(step.action)
            assert text_of(page, "#position") == f"step {t} of 3"
    choose(page, 1, 3)
    assert "final observation" in text_of(page, "#no-tree")
    assert page.evaluate("document.getElementById('tree').hidden")
    page.evaluate("document.getElementById('previous').click()")
    assert text_of(page, "#position") == "step 2 of 3"
    page.evaluate("document.querySelector('button[data-episode=\"3\"]').click()")
    assert text_of(page, "#position") == "step 0 of 3"
    assert page.evaluate("document.getElementById('tree').data[0].ids.length") == 9
    assert not page.evaluate("document.getElementById('tree').hidden")
    assert_clean(page, path)


def test_the_areas_of_a_tree_are_its_visits(page: Page, tmp_path: Path) -> None:
    trajectory = played("run", 0, length=1, simulations=40)
    path = write_report(write_run(tmp_path / "run", [trajectory]))
    assert page.open(path) == "true"
    totals = page.evaluate(
        """(() => {
          const { ids, parents, values } = document.getElementById('tree').data[0];
          const total = Object.fromEntries(ids.map((id, i) => [id, values[i]]));
          for (let i = ids.length - 1; i >= 0; i--) if (parents[i]) total[parents[i]] += total[ids[i]];
          return total;
        })()"""
    )
    assert totals == {str(node.node_id): node.visits for node in trajectory.nodes}


def test_nothing_in_a_run_takes_the_page_over(page: Page, tmp_path: Path) -> None:
    charset = spaces.Text(200, charset="".join(sorted(set("".join(HOSTILE)))))
    failure = Failure(HOSTILE[0], HOSTILE[1], True)
    episodes = [
        played("run", 0, length=5, observations=HOSTILE, task_id=HOSTILE[0]),
        played(
            "run", 1, length=2, observations=HOSTILE, task_id=HOSTILE[2], failure=failure, earlier=[failure]
        ),
    ]
    folder = write_run(
        tmp_path / "run",
        episodes,
        observation_space=charset,
        timings={HOSTILE[0]: {"seconds": 1, "calls": 1}},
    )
    (folder / "run.json").write_text('{"run_id": "</title><script>window.pwned = 1</script>", "config": 3}')
    path = write_report(folder)
    assert page.open(path) == "true"
    for t in range(5):
        choose(page, 0, t)
        assert text_of(page, "#observation") == HOSTILE[t]
    choose(page, 1, 0)
    assert HOSTILE[0] in text_of(page, "#failure")
    assert page.evaluate("window.pwned === undefined")
    assert (
        page.evaluate("document.querySelectorAll('img, a, iframe, object, embed, svg[onload]').length") == 0
    )
    scripts = "[...document.scripts].filter((script) => /^window\\.pwned/.test(script.textContent)).length"
    assert page.evaluate(scripts) == 0
    assert_clean(page, path)


def test_text_actions_are_shown_as_they_are(page: Page, tmp_path: Path) -> None:
    """Labels of a chart are the one place where the chart library reads markup."""
    from dataclasses import replace

    trajectory = played("run", 0, length=1, simulations=30)
    nodes = [
        replace(node, action=None if node.action is None else HOSTILE[node.action])
        for node in trajectory.nodes
    ]
    step = trajectory.steps[0]
    first = replace(step, action=HOSTILE[step.action], legal_actions=list(HOSTILE[:4]))
    texts = spaces.Text(200, charset="".join(sorted(set("".join(HOSTILE)))))
    changed = replace(trajectory, steps=[first, *trajectory.steps[1:]], nodes=nodes)
    path = write_report(write_run(tmp_path / "run", [changed], action_space=texts))
    assert page.open(path) == "true"
    labels = page.evaluate(
        "[...document.querySelectorAll('#tree g.slicetext text')].map((label) => label.dataset.unformatted)"
    )
    assert any("&lt;" in label for label in labels)
    assert (
        page.evaluate("document.querySelectorAll('#tree a, #tree img, #tree tspan[style*=bold]').length") == 0
    )
    assert page.evaluate("window.pwned === undefined")
    assert_clean(page, path)


@pytest.mark.parametrize("kind", ["no episodes", "only failures", "killed at once", "no search"])
def test_thin_runs_are_shown(page: Page, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "run"
    failure = Failure("did not start", "boot", False)
    if kind == "no episodes":
        write_run(folder, [])
    elif kind == "only failures":
        write_run(folder, [played("run", i, length=0, failure=failure, observations=[]) for i in range(3)])
    elif kind == "no search":
        write_run(folder, [played("run", 0, length=2, simulations=0)])
    else:
        folder.mkdir()
        (folder / "run.json").write_text("{")
    path = write_report(folder)
    assert page.open(path) == "true"
    assert_clean(page, path)
    assert page.evaluate("document.getElementById('trouble').hidden")
    if kind != "no search":
        assert "No episode" in page.evaluate("document.body.innerText")


def test_a_large_tree_says_what_is_left_out(page: Page, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [played("run", 0, length=1, simulations=300)])
    path = write_report(folder, limits=Limits(max_tree_nodes=100))
    assert page.open(path) == "true"
    assert "the 100 most visited of 301 nodes" in text_of(page, "#legend")
    assert page.evaluate("document.getElementById('tree').data[0].ids.length") == 100


def test_the_page_follows_the_readers_theme(page: Page, tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", [played("run", i, return_=float(i)) for i in range(3)]))
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    assert page.open(path) == "true"
    colour = "getComputedStyle(document.querySelector('#chart-returns .xtick text')).fill"
    light = page.evaluate(colour)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    page.evaluate(
        f"new Promise((done) => {{ const look = () => {colour} !== {light!r} ? done() : setTimeout(look, 20);"
        " look(); })"
    )
    assert page.evaluate(colour) != light
    assert_clean(page, path)


def test_a_browser_that_cannot_unpack_says_so(page: Page, tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "run", [played("run", 0)]))
    page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    assert page.open(path) == "failed"
    assert "too old" in text_of(page, "#trouble")
    assert "terminated" in page.evaluate("document.body.innerText")  # the tables are there
