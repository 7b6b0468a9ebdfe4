"""What a filter that knows the plan could add to the other four members: a bound on the regimes' member in the synthetic market.

`python tests/bench/regime_bound.py FOLDER --seeds 33,34,35` makes each seed's market in the folder (or finds it there), trains all five
members on its first session and takes, on the second, the ensemble without the HMM. To its log-odds are added what a filter says of drift
and regime, with coefficients fitted on the other seeds' markets; printed is what that saves of the log-loss, with the t statistic of
Diebold and Mariano. The filters, from what no one can see to what anyone can:

    truth     the regime itself
    paths     each instrument's efficient price and the informed traders' signal, every 0.1 s
    prices    each instrument's efficient price, every 0.1 s
    recorded  the recording's seconds: mids, takers' imbalance, events, squared moves, spreads, by an interacting-multiple-model filter
              (Blom and Bar-Shalom 1988) of ten modes, five regimes with gamma(2) dwell times, and of the signals within them

Coefficients and modes are the plan's, emissions of events, moves and spreads those of the true regimes in the first session: no fit can do
better. About four minutes of CPU a seed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.linalg import expm
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).parents[2]))
from catalog.databento import import_dbn
from catalog.events import SCALE, TRADE, read_catalog
from catalog.planted import GRID_S, Hidden, Plan, expected_return, hidden_state
from catalog.synthetic import make_market
from cift_models import artifacts
from cift_models.features import NAMES
from cift_models.inference import Engine, stream
from cift_models.labels import LABELS, H, Split, classify
from cift_models.significance import mean_test
from cift_models.train import train
from cift_models.weigh import weigh
from cift_models.windows import HORIZONS_NS

Floats = NDArray[np.float64]
EVENTS, SESSIONS, INSTRUMENTS = 1_180_000, 2, 3  # the demo market's
THIN = 4  # every so many decisions are scored
PLAN = Plan()
SIGMA, DRIFT = np.array(PLAN.sigma), np.array(PLAN.drift)
RHO = -PLAN.alpha * np.sqrt(PLAN.tau / 2)  # of the signal's noise with the price's
GAMMA = np.sqrt(1 - PLAN.beta**2)
LED = np.array([[1, 0, 0], [PLAN.beta, GAMMA, 0], [PLAN.beta, 0, GAMMA]])  # what an instrument has of each one's own price
MEAN_S = -(-EVENTS // SESSIONS) / (INSTRUMENTS * PLAN.mean_density())
LEAST = -12.0  # log-likelihood, below the best mode's, that one second may cost: an odd second decides nothing alone


def chain(step_s: float) -> Floats:
    """Transitions (10, 10) in a step of the regimes, each in two phases: a gamma(2) time is the sum of two exponential ones."""
    rates, q = 2 / (np.array(PLAN.dwell) * MEAN_S), np.zeros((10, 10))
    for r, rate in enumerate(rates):
        q[2 * r, 2 * r], q[2 * r, 2 * r + 1], q[2 * r + 1, 2 * r + 1] = -rate, rate, -rate
        q[2 * r + 1, ::2] += rate * np.array(PLAN.switch)[r]
    return expm(q * step_s)


def hidden(seed: int, session: int) -> Hidden:
    return hidden_state(np.random.default_rng([seed, session + 1]), PLAN, INSTRUMENTS, MEAN_S, -(-EVENTS // SESSIONS))


def known_paths(h: Hidden, signal: bool, every: int = 20) -> tuple[Floats, Floats]:
    """P(regime) (n, 5) and its time in s from the open, given the efficient prices and, with `signal`, what the informed know.

    sigma is that of the step: at 5 ms squared moves tell it. Without the signal returns are white (see :mod:`catalog.planted`).
    """
    dt, own, x = every * GRID_S, h.own[:, ::every], h.x[:, ::every]
    n = own.shape[1] - 1
    sigma = np.sqrt((SIGMA[h.regime] ** 2)[: n * every].reshape(n, every).mean(axis=1))
    keep = np.exp(-dt / PLAN.tau)
    z = (x[:, 1:] - keep * x[:, :-1]) / np.sqrt(1 - keep**2) if signal else np.zeros((INSTRUMENTS, n))
    rest = np.diff(own, axis=1) - (PLAN.alpha * sigma * x[:, :-1] * dt if signal else 0.0)
    e = rest[..., None] - RHO * SIGMA * np.sqrt(dt) * z[..., None] - DRIFT * dt
    var = (1 - RHO**2 if signal else 1.0) * SIGMA**2 * dt
    log_p = (-0.5 * e**2 / var - 0.5 * np.log(var)).sum(axis=0)
    other = np.abs(sigma[:, None] - SIGMA) > 0.02 * SIGMA
    log_p[other & ~other.all(axis=1, keepdims=True)] -= 1e3
    moves, p, out = chain(dt), np.eye(10)[0], np.empty((n, 10))
    for t in range(n):
        p = (p @ moves) * np.exp(np.repeat(log_p[t] - log_p[t].max(), 2))
        out[t] = p = p / p.sum()
    return out.reshape(n, 5, 2).sum(axis=2), (np.arange(n) + 1) * dt


def seconds(root: Path, sessions: list[dict[str, Any]]) -> list[dict[str, Floats]]:
    """Of each session's whole seconds (T, I): mid in ticks at the end, events, squared moves (ticks), spread (ticks), imbalance."""
    instruments, chunks = read_catalog(root)
    first = [s["start_ns"] // SCALE for s in sessions]
    length = [s["end_ns"] // SCALE - f + 1 for s, f in zip(sessions, first)]
    names = "mid", "events", "squares", "spread", "takers", "sided"
    out = [{name: np.zeros((t, INSTRUMENTS)) for name in names} for t in length]
    last, tick = np.full((2, INSTRUMENTS), np.nan), instruments[0].tick / SCALE
    for block in stream(instruments, chunks):
        e = block.events
        session = np.searchsorted(np.array(first) * SCALE, e["ts_init"], side="right") - 1
        for i in np.unique(e["instrument"]):
            for s in np.unique(session):
                mine = np.flatnonzero((e["instrument"] == i) & (session == s))
                at, o = e["ts_init"][mine] // SCALE - first[s], out[s]
                mid, spread = (block.rows[mine, NAMES.index(name)] for name in ("mid", "spread"))
                taken, side = e["action"][mine] == TRADE, e["side"][mine].astype(float)
                seen = np.isfinite(mid)
                before = np.append(last[s, i], mid[seen][:-1])
                moved = np.nan_to_num((mid[seen] - before) / tick)
                np.add.at(o["events"][:, i], at, 1.0)
                np.add.at(o["squares"][:, i], at[seen], moved**2)
                np.add.at(o["takers"][:, i], at[taken], np.abs(side[taken]))
                np.add.at(o["sided"][:, i], at[taken], side[taken])
                if seen.any():
                    o["mid"][at[seen], i], last[s, i] = mid[seen] / tick, mid[seen][-1]
                o["spread"][at[np.isfinite(spread)], i] = spread[np.isfinite(spread)] / tick
    for o in out:
        for name in ("mid", "spread"):  # a second without an event is as the one before
            here = np.where(o[name] > 0, np.arange(len(o[name]))[:, None], 0)
            o[name] = np.take_along_axis(o[name], np.maximum.accumulate(here), axis=0)
        o["returns"] = np.diff(o["mid"], axis=0, prepend=o["mid"][:1])
        o["returns"][:60][np.abs(o["returns"][:60]) > 100] = 0.0  # the first mid
        o["imbalance"] = o["sided"] / (1 + o["takers"])
        told = np.log(0.1 + np.sqrt(o["squares"])), np.log1p(o["events"]), np.log(np.maximum(o["spread"], 0.5))
        o["agitation"] = np.stack([a.mean(axis=1) for a in told], axis=1)
    return out


def regime_at(session: dict[str, Any], ns: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array(session["regime"])[np.maximum(np.searchsorted(session["regime_ts"], ns, side="right") - 1, 0)]


def normal(x: Floats, mean: Floats, cov: Floats) -> Floats:
    e = np.linalg.solve(np.linalg.cholesky(cov), (x - mean).T)
    return -0.5 * (e**2).sum(axis=0) - 0.5 * np.linalg.slogdet(cov)[1]


def recorded(seed: int, sessions: list[dict[str, Any]], found: list[dict[str, Floats]]) -> Floats:
    """P(regime) (T, 5) at the ends of the second session's seconds."""
    a, b = found
    ends = (sessions[0]["start_ns"] // SCALE + 1 + np.arange(len(a["mid"]))) * SCALE - SCALE // 2
    was, h = regime_at(sessions[0], ends), hidden(seed, 0)
    at = np.clip(((ends - sessions[0]["start_ns"]) / SCALE / GRID_S).astype(int), 0, len(h.regime) - 1)
    known = np.stack([np.tanh(expected_return(PLAN, h, i))[at] for i in range(INSTRUMENTS)], axis=1)
    lean = float((known * a["imbalance"]).sum() / (known**2).sum())
    noise = float((a["imbalance"] - lean * known).var())
    plain = np.full((len(b["mid"]), 5), -50.0)
    for r in range(5):
        if (was == r).sum() > 20:
            x = a["agitation"][was == r]
            plain[:, r] = normal(b["agitation"], x.mean(axis=0), np.cov(x.T) + 0.01 * np.eye(3))
    plain = np.repeat(np.maximum(plain - plain.max(axis=1, keepdims=True), LEAST), 2, axis=1)
    sigma, drift, keep = np.repeat(SIGMA, 2), np.repeat(DRIFT, 2), float(np.exp(-1 / PLAN.tau))
    q, eye, n = np.sqrt(1 - keep**2), np.eye(INSTRUMENTS), INSTRUMENTS
    forth, shake, push = np.zeros((10, 2 * n, 2 * n)), np.zeros((10, 2 * n, 2 * n)), np.zeros((10, 2 * n))
    for m in range(10):  # state: signals, and own returns of the second
        forth[m, :n, :n], forth[m, n:, :n], push[m, n:] = keep * eye, PLAN.alpha * sigma[m] * eye, drift[m]
        shake[m] = np.kron([[q**2, sigma[m] * RHO * q], [sigma[m] * RHO * q, sigma[m] ** 2]], eye)
    tilt = 0.8 * lean  # tanh is flatter than its argument
    see = np.zeros((2 * n, 2 * n))
    see[:n, n:], see[n:, :n] = LED, tilt * LED
    blur = np.diag([0.15] * n + [noise] * n)  # 0.15: of the mid about the efficient price, squared ticks
    offset = np.zeros((10, 2 * n))
    offset[:, n:] = (tilt * drift / (PLAN.alpha * sigma))[:, None]
    y, moves = np.concatenate([b["returns"], b["imbalance"]], axis=1), chain(1.0)
    mean, cov, p = np.zeros((10, 2 * n)), np.tile(np.diag([1.0] * n + [0.0] * n), (10, 1, 1)), np.eye(10)[0]
    out = np.empty((len(y), 10))
    for t in range(len(y)):
        joint = p[:, None] * moves
        ahead = joint.sum(axis=0)
        w = joint / np.maximum(ahead, 1e-300)
        mixed = w.T @ mean
        d = mean[:, None] - mixed
        around = np.einsum("ij,ikl->jkl", w, cov) + np.einsum("ij,ijk,ijl->jkl", w, d, d)
        mean = np.einsum("mij,mj->mi", forth, mixed) + push
        cov = forth @ around @ forth.transpose(0, 2, 1) + shake
        e, s = y[t] - mean @ see.T - offset, see @ cov @ see.T + blur
        gain = cov @ see.T @ np.linalg.inv(s)
        score = -0.5 * np.einsum("mi,mij,mj->m", e, np.linalg.inv(s), e) - 0.5 * np.linalg.slogdet(s)[1]
        score = np.maximum(score - score.max(), LEAST) + plain[t]
        mean, cov = mean + np.einsum("mij,mj->mi", gain, e), cov - gain @ see @ cov
        p = ahead * np.exp(score - score.max())
        out[t] = p = p / p.sum()
    return out.reshape(len(y), 5, 2).sum(axis=2)


def market(folder: Path, seed: int) -> dict[str, Any]:
    """The second session's decisions of the ensemble with and without the HMM, and each filter's P(regime) at them."""
    made = make_market(folder / f"market-{seed}", seed, events=EVENTS)
    root = import_dbn([*made.mbo, *made.definitions], folder / f"catalog-{seed}").root
    sessions = json.loads(made.truth.read_text())["sessions"]
    out = folder / f"models-{seed}"
    if not (out / "manifest.json").is_file():
        train(root, end=sessions[1]["start_ns"] - 1, out=out)
    instruments, m = read_catalog(root)[0], artifacts.read(out, NAMES).manifest
    engine = Engine.load(out, instruments)
    members, e = [member for _, member in engine._present], engine.ensemble
    sets = [members, [x for x in members if x.name != "hmm"]]
    split = Split(**m["folds"][-1]["split"])
    runs = weigh(
        lambda: read_catalog(root), m["instruments"], NAMES, sets, split, e.threshold, e.eta, e.config, np.iinfo(np.int64).max
    )  # fmt: skip
    both, without = (r.after or {} for r in runs)
    ts, h, start = without["ts"], hidden(seed, 1), sessions[1]["start_ns"]
    seen = {"truth": np.eye(5)[regime_at(sessions[1], ts)]}
    for name, signal in (("paths", True), ("prices", False)):
        p, t = known_paths(h, signal)
        seen[name] = p[np.maximum(np.searchsorted(start + (t * SCALE).astype(np.int64), ts, side="right") - 1, 0)]
    p = recorded(seed, sessions, seconds(root, sessions))
    seen["recorded"] = p[np.clip(ts // SCALE - start // SCALE - 1, 0, len(p) - 1)]
    y = classify(without["move"], e.threshold[without["instrument"]])
    return {"ts": ts, "y": y, "with": both["proba"], "without": without["proba"], "seen": seen}


def shifts(p: Floats) -> Floats:
    """What may be added to the log-odds (6, n, 3): up against down by the drift, and movement against none by each regime."""
    drift = (p[:, 1] - p[:, 2])[:, None] * np.array([-1.0, 0.0, 1.0])
    return np.stack([drift, *(p[:, r : r + 1] * np.array([-0.5, 1.0, -0.5]) for r in range(5))])


def losses(c: Floats, base: Floats, x: Floats, y: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Log-losses (n,) of base + c x, and the gradient of their mean."""
    z = base + np.tensordot(c, x, 1)
    z = z - z.max(axis=1, keepdims=True)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    told = p[np.arange(len(y)), y]
    p[np.arange(len(y)), y] -= 1
    return -np.log(told), np.tensordot(x, p, ((1, 2), (0, 1))) / len(y)


def fitted(base: Floats, x: Floats, y: NDArray[np.int64]) -> Floats:
    def f(c: Floats) -> tuple[float, Floats]:
        loss, slope = losses(c, base, x, y)
        return float(loss.mean()) + 1e-5 * float(c @ c), slope + 2e-5 * c

    found: Floats = minimize(f, np.zeros(len(x)), jac=True, method="L-BFGS-B").x
    return found


def main(folder: Path, seeds: str = "33,34,35") -> None:
    numbers = [int(s) for s in seeds.split(",")]
    if len(numbers) < 2:
        sys.exit("two seeds are needed: coefficients for one market are fitted on the others")
    folder.mkdir(parents=True, exist_ok=True)
    found = {s: market(folder, s) for s in numbers}
    print("saved log-loss (t), seeds " + seeds)
    for h in range(H):
        rows = {s: np.flatnonzero(m["y"][:, h] >= 0)[::THIN] for s, m in found.items()}
        y = {s: m["y"][rows[s], h].astype(np.int64) for s, m in found.items()}
        base = {s: np.log(m["without"][rows[s], h].astype(np.float64)) for s, m in found.items()}
        plain = {s: losses(np.zeros(0), base[s], np.empty((0, *base[s].shape)), y[s])[0] for s in numbers}
        told = []
        for s, m in found.items():
            now = -np.log(m["with"][rows[s], h].astype(np.float64))[np.arange(len(y[s])), y[s]]
            told.append(mean_test(plain[s] - now, m["ts"][rows[s]], HORIZONS_NS[h]))
        line(h, "the HMM as it is", told)
        for name in ("truth", "paths", "prices", "recorded"):
            x = {s: shifts(m["seen"][name][rows[s]]) for s, m in found.items()}
            for what, part in (("drift", slice(0, 1)), ("drift and regimes", slice(0, 6))):
                told = []
                for s, m in found.items():
                    o = [o for o in numbers if o != s]
                    shift = np.concatenate([x[k][part] for k in o], axis=1)
                    c = fitted(np.concatenate([base[k] for k in o]), shift, np.concatenate([y[k] for k in o]))
                    gain = plain[s] - losses(c, base[s], x[s][part], y[s])[0]
                    told.append(mean_test(gain, m["ts"][rows[s]], HORIZONS_NS[h]))
                line(h, f"{name}: {what}", told)


def line(h: int, name: str, told: list[Any]) -> None:
    print(f"{LABELS[h]:<6}{name:<28}" + "  ".join(f"{t.mean:+.4f} ({t.t:+.1f})" for t in told), flush=True)


if __name__ == "__main__":
    typer.run(main)
