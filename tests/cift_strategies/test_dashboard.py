"""The page in a real browser, on a real server that is fed by a node: what it shows, that it comes back, and that its buttons command."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nodes import GUARD_S, Served, serving
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from test_server import messages  # noqa: F401 - a fixture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync")
SOURCES = Path(__file__).resolve().parents[2] / "cift_strategies/server/page"
expect.set_options(timeout=GUARD_S * 1e3)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install the package chromium to test the page")
    with sync_playwright() as p:
        found = p.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield found
        found.close()


@pytest.fixture(scope="module")
def served(messages: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:  # noqa: F811
    with serving(tmp_path_factory.mktemp("page"), messages) as found:
        found.node.tell(120)
        found.until(lambda: found.http.get("/api/v1/snapshot").json()["seq"] == found.node.at + 1)
        yield found


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """The page, open; an error on its console fails the test."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    shown, wrong = context.new_page(), list[str]()

    def heard(message: ConsoleMessage) -> None:
        expected = ("ERR_CONNECTION_REFUSED", "status of 401", "status of 409")  # a server that is away, a wrong token, a refused command
        if message.type == "error" and not any(e in message.text for e in expected):
            wrong.append(message.text)

    shown.on("console", heard)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.goto(served.url)
    expect(shown.locator("[data-test=mid]")).to_be_visible()
    yield shown
    context.close()
    assert not wrong


def shown(page: Page, name: str) -> str:
    return page.locator(f'[data-test="{name}"]').inner_text()


def number(text: str) -> float:
    return float(text.split()[0].replace("\N{MINUS SIGN}", "-").replace(",", "").replace("+", ""))


def test_numbers_are_those_of_the_api(page: Page, served: Served) -> None:
    told = served.http.get("/api/v1/snapshot").json()
    first = told["instruments"][0]
    expect(page.locator("[data-test=state]")).to_have_text("running")
    expect(page.locator("[data-test=mid]")).to_have_text(f"{first['mid']:,.3f}")
    for row, levels in ((".ladder tr.ask", first["asks"][::-1]), (".ladder tr.bid", first["bids"])):
        cells = [[number(c) for c in r.locator("td").all_inner_texts()] for r in page.locator(row).all()]
        assert cells == [[n, size, price] for price, size, n in levels]
    assert number(shown(page, f"pnl-{told['pnl'][0]['currency']}")) == pytest.approx(told["pnl"][0]["net"], abs=0.005)
    traded = [p for p in told["positions"] if p["size"] or p["realised"] or p["fees"]]
    assert traded
    for p in traded:
        cells = page.locator(f'[data-test="position-{p["symbol"]}"] td').all_inner_texts()
        assert (0.0 if cells[1] == "flat" else number(cells[1])) == p["size"]
        assert number(cells[6]) == pytest.approx(p["fees"], abs=0.005) and number(cells[7]) == pytest.approx(p["net"], abs=0.005)
    newest = max(told["logs"]["decisions"], key=lambda d: d["seq"])
    assert newest["text"] in page.locator(".log li").first.inner_text()


def test_votes_are_those_of_the_members(page: Page, served: Served) -> None:
    whole = served.http.get("/api/v1/snapshot").json()
    absent = {m["member"] for m in whole["models"]["members"] if not m["present"]}
    for h in whole["instruments"][0]["prediction"]["horizons"]:
        label = f"{h['horizon_ms']} ms" if h["horizon_ms"] < 1000 else f"{h['horizon_ms'] // 1000} s"
        page.get_by_role("group", name="horizon").get_by_role("button", name=label, exact=True).click()
        said = {n: i for n, i in zip(page.locator(".votes dt").all_inner_texts(), page.locator(".votes dd").all())}
        for member, vote in h["votes"].items():
            if vote is None:
                assert said[member].inner_text() == ("not in these models" if member in absent else "abstains")
            else:
                spoken = said[member].locator("[role=img]").get_attribute("aria-label")
                assert spoken == ", ".join(f"{w} {int(100 * v + 0.5)} %" for w, v in zip(("down", "flat", "up"), vote))


def test_it_follows_the_node(page: Page, served: Served) -> None:
    served.node.tell(60)
    served.until(lambda: served.http.get("/api/v1/snapshot").json()["seq"] == served.node.at + 1)
    mid = served.http.get("/api/v1/snapshot").json()["instruments"][0]["mid"]
    expect(page.locator("[data-test=mid]")).to_have_text(f"{mid:,.3f}")


def test_it_says_when_it_is_old_and_comes_back_by_itself(page: Page, served: Served) -> None:
    """The server is killed; the supervisor starts another, and the page finds it without being loaded again."""
    page.evaluate("window.stayed = true")
    process = served.supervisor.process
    assert process is not None
    port = served.url.rsplit(":", 1)[1]
    process.send_signal(signal.SIGKILL)
    expect(page.locator("[data-test=old]")).to_be_visible()
    served.ready()
    assert served.url.endswith(port)
    served.node.tell(3)
    expect(page.locator("[data-test=old]")).to_have_count(0)
    assert page.evaluate("window.stayed")


def test_kill_asks_and_needs_the_token(page: Page, served: Served) -> None:
    page.get_by_role("button", name="Kill").click()
    page.get_by_role("dialog", name="kill").get_by_role("button", name="No, go on").click()
    assert not served.node.commands
    page.get_by_role("button", name="Kill").click()
    dialog = page.get_by_role("dialog", name="kill")
    dialog.get_by_label("Why").fill("it is wrong")
    dialog.get_by_role("button", name="Kill").click()
    token = page.get_by_role("dialog", name="token")
    token.get_by_label("Token").fill("not the token")
    token.get_by_role("button", name="Send").click()
    expect(token.get_by_label("Token")).to_have_value("")  # asked again: the first was wrong
    assert not served.node.commands
    token.get_by_label("Token").fill(served.token)
    token.get_by_role("button", name="Send").click()
    served.until(lambda: served.node.commands)
    assert served.node.commands == [("kill", {"reason": "it is wrong"})]
    served.node.tell(1)
    expect(page.locator("[data-test=state]")).to_have_text("killed")
    page.get_by_role("button", name="Resume").click()  # the token is remembered
    served.until(lambda: len(served.node.commands) == 2)
    assert served.node.commands[1][0] == "resume"


def test_a_refused_command_is_told(page: Page, served: Served) -> None:
    def refuse(name: str, args: dict[str, Any]) -> Any:
        from catalog.errors import InputError

        raise InputError("models/manifest.json is missing")

    obeys, served.node.answer = served.node.answer, refuse
    page.evaluate("t => sessionStorage.setItem('cift-token', t)", served.token)
    page.get_by_role("button", name="Reload models").click()
    expect(page.get_by_text("manifest.json is missing")).to_be_visible()
    served.node.answer = obeys


def test_instruments_are_chosen_by_keyboard(page: Page, served: Served) -> None:
    told = served.http.get("/api/v1/snapshot").json()["instruments"]
    page.get_by_role("option", selected=True).focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("option", selected=True)).to_contain_text(told[1]["symbol"])
    expect(page.locator("[data-test=mid]")).to_have_text(f"{told[1]['mid']:,.3f}")
    for key, at in (("End", -1), ("Home", 0)):
        page.keyboard.press(key)
        expect(page.get_by_role("option", selected=True)).to_contain_text(told[at]["symbol"])
    expect(page.get_by_role("option", selected=True)).to_be_focused()


def test_a_picture_shows_what_there_is_though_no_frame_has_come(browser: Browser, served: Served) -> None:
    """Chromium takes it as soon as the page counts as loaded."""
    context = browser.new_context()
    page = context.new_page()
    page.route_web_socket("**/frames", lambda _: None)  # open, and silent
    page.goto(f"{served.url}#still", wait_until="load")
    mid = page.evaluate("document.querySelector('[data-test=mid]')?.innerText")
    assert mid == f"{served.http.get('/api/v1/snapshot').json()['instruments'][0]['mid']:,.3f}"
    context.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1_100, 900), (1_600, 1_000)])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(browser: Browser, served: Served, width: int, height: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.goto(served.url)
    expect(page.locator("[data-test=mid]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = [b for b in (p.bounding_box() for p in page.locator(".panel").all()) if b]
    assert len(boxes) == 11 and all(b["width"] > 150 and b["height"] > 60 for b in boxes)
    overlapping = [
        (a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]
        if a["x"] < b["x"] + b["width"] - 1 and b["x"] < a["x"] + a["width"] - 1
        and a["y"] < b["y"] + b["height"] - 1 and b["y"] < a["y"] + a["height"] - 1
    ]  # fmt: skip
    assert not overlapping
    context.close()


@pytest.mark.parametrize(("width", "height"), [(1_440, 900), (390, 844)])
def test_however_many_orders_work_the_newest_closed_trade_is_seen_beside_them(
    browser: Browser, messages: list[dict[str, Any]], tmp_path: Path, width: int, height: int  # noqa: F811
) -> None:
    order = next(o for m in messages for o in m["logs"].get("orders", []))
    trade = next(t for m in messages for t in m["logs"].get("trades", []))
    logs = {
        "orders": [order | {"id": f"many-{n}", "number": n, "open": True} for n in range(100)],
        "trades": [trade | {"seq": n + 1, "number": n} for n in range(40)],
    }
    with serving(tmp_path, [messages[0] | {"logs": logs}]) as s:
        context = browser.new_context(viewport={"width": width, "height": height})
        page = context.new_page()
        page.goto(s.url)
        orders, trades = (page.get_by_role("region", name=name) for name in ("Working orders", "Closed trades"))
        expect(orders.locator("tbody tr")).to_have_count(100)
        expect(trades.locator("tbody tr")).to_have_count(40)
        if width < 800:
            trades.scroll_into_view_if_needed()
        for place in (orders, trades):
            expect(place.locator("tbody tr").first).to_be_in_viewport(ratio=0.9)
            place.focus()
            page.keyboard.press("End")
            expect(place.locator("tbody tr").last).to_be_in_viewport(ratio=0.9)
        context.close()


def test_the_built_page_is_that_of_the_sources(tmp_path: Path) -> None:
    if not (SOURCES / "node_modules").is_dir() or shutil.which("npx") is None:
        pytest.skip("the page's tools are not installed: run `npm ci` in cift_strategies/server/page to compare")
    subprocess.run(["npx", "vite", "build", "--outDir", str(tmp_path)], cwd=SOURCES, check=True, capture_output=True)
    built = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = SOURCES.parent / "static"
    assert built == {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()}
