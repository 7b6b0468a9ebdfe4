"""Who moves with whom, and who first: Hayashi-Yoshida covariance of unsynchronised prices, its lead-lag, and what follows from both.

Takes the ticks of two prices (stamps in ns, never decreasing; prices in any unit) and gives covariance, correlation and the lag at which it
is greatest; nothing is interpolated. :class:`Links` carries both along a stream of several instruments, in fixed memory; a
:class:`Graph` of them gives the best hedge of each and how far a shock spreads. A positive lag: the first of the two leads.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from catalog.errors import InputError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
SECOND: Final = 1_000_000_000
FINEST_NS: Final = 100_000  # the lag is searched down to this step


@njit(cache=True, nogil=True)
def contrast(tx, dx, ty, dy, lags, cov, square):  # type: ignore[no-untyped-def]
    """For each lag the sum of dx_a dy_b over overlapping intervals (tx_a, tx_a+1] and (ty_b, ty_b+1] - lag, and that of (dx_a dy_b)^2.

    `tx` (n + 1,), `dx` (n,), `ty` (m + 1,), `dy` (m,); `lags` (l,) ns; results into `cov` and `square` (l,). O(n + m) for each lag: of two
    intervals the one that ends first can overlap nothing further.
    """
    for q in range(len(lags)):
        a, b, s, v, lag = 0, 0, 0.0, 0.0, lags[q]
        while a < len(dx) and b < len(dy):
            start, end = ty[b] - lag, ty[b + 1] - lag
            if max(tx[a], start) < min(tx[a + 1], end):
                p = dx[a] * dy[b]
                s += p
                v += p * p
            if tx[a + 1] <= end:
                a += 1
            else:
                b += 1
        cov[q], square[q] = s, v


def hayashi_yoshida(tx: I64, x: F64, ty: I64, y: F64, lag_ns: int = 0) -> float:
    """Covariance of the increments of x and y over the time that both cover (Hayashi and Yoshida 2005, eq. 2.2).

    `tx`, `ty` (n,), (m,) ns, not decreasing; `x`, `y` prices at them. `lag_ns` > 0 moves y back: what y did lag_ns after x counts as
    simultaneous. In the product of the prices' units; 0 with fewer than two ticks. Raises InputError for stamps out of order.
    """
    cov = np.empty(1)
    tx, x, ty, y = _ticks(tx, x), np.asarray(x, np.float64), _ticks(ty, y), np.asarray(y, np.float64)
    contrast(tx, np.diff(x), ty, np.diff(y), np.array([lag_ns], np.int64), cov, np.empty(1))
    return float(cov[0])


def _ticks(t: Any, x: Any) -> I64:
    t = np.ascontiguousarray(t, np.int64)
    if len(t) != len(x) or (np.diff(t) < 0).any():
        raise InputError("ticks need one price each and stamps that do not decrease: sort them by time")
    return t


class Lead(NamedTuple):
    """`lag_ns` > 0: x leads y. `correlation` at that lag, `z` its size in standard errors under independence. `ratio`: the sum of squared
    correlations at positive lags over that at negative ones (Huth and Abergel 2014), > 1 where x leads."""

    lag_ns: int
    correlation: float
    z: float
    ratio: float


def lead_lag(tx: I64, x: F64, ty: I64, y: F64, reach_ns: int = SECOND, step_ns: int | None = None) -> Lead:
    """The lag within +-`reach_ns` that maximises the shifted Hayashi-Yoshida covariance (Hoffmann, Rosenbaum and Yoshida 2013, eq. 3).

    First over a grid of `step_ns` (None: a quarter of the mean time w between ticks of the busier price, at most 2,001 points); then,
    around the best of it, the maximum over a grid of w / 64 (at least 0.1 ms) of the covariance averaged over lags by a triangle of
    half-width w. The covariance itself is a step function with its noise in every step: averaged it finds planted lags with about half the
    error.
    A price that never moves has lag 0 and correlation 0. O(n) for each lag. Raises InputError for stamps out of order.
    """
    tx, ty = _ticks(tx, x), _ticks(ty, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(tx) < 2 or len(ty) < 2:
        return Lead(0, 0.0, 0.0, 1.0)
    lo, hi = max(tx[0], ty[0]), min(tx[-1], ty[-1])
    tx, x = _cover(tx, x, lo, hi)
    ty, y = _cover(ty, y, lo, hi)
    dx, dy = np.diff(x), np.diff(y)
    scale = float(np.sqrt((dx @ dx) * (dy @ dy)))
    if not scale > 0:
        return Lead(0, 0.0, 0.0, 1.0)
    width = int(hi - lo) // max(len(dx), len(dy))
    coarse = max(1, int(step_ns if step_ns is not None else max(width // 4, reach_ns // 1_000)))

    def scan(around: int, points: int, step: int) -> tuple[I64, F64, F64]:
        lags = around + np.arange(-points, points + 1, dtype=np.int64) * step
        cov, square = np.empty(len(lags)), np.empty(len(lags))
        contrast(tx, dx, ty, dy, lags, cov, square)
        return lags, cov, square

    lags, cov, _ = scan(0, reach_ns // coarse, coarse)
    back, ahead = float((cov[lags < 0] ** 2).sum()), float((cov[lags > 0] ** 2).sum())
    step = max(FINEST_NS, width // 64)
    reach, half = coarse // step + 1, min(64, max(1, width // step))
    lags, cov, square = scan(int(lags[_peak(cov)]), reach + half, step)
    kernel = 1 - np.abs(np.arange(-half, half + 1)) / (half + 1)
    best = half + _peak(np.convolve(cov, kernel / kernel.sum(), "valid"))
    z = float(cov[best] / np.sqrt(square[best])) if square[best] > 0 else 0.0
    return Lead(int(lags[best]), float(cov[best]) / scale, z, ahead / max(back, 1e-300))


def _peak(cov: F64) -> int:
    top = np.flatnonzero(np.abs(cov) == np.abs(cov).max())
    return int(top[len(top) // 2])


def _cover(t: I64, x: F64, lo: int, hi: int) -> tuple[I64, F64]:
    """The ticks from the last at or before `lo` to the first at or after `hi`."""
    a, b = max(0, int(np.searchsorted(t, lo, "right")) - 1), int(np.searchsorted(t, hi, "left")) + 1
    return t[a:b], x[a:b]


SIGNIFICANT: Final = 4.0  # standard errors: about 1 in 500 for the greatest of 33 lags without any dependence
TICKS: Final = 512  # latest mid changes of an instrument from which its lead-lag is estimated
LEAST_TICKS: Final = 32
REFRESH: Final = 30  # every pair is estimated again within so many rounds of `end_round`
HALF_LIFE: Final = 1_200  # cells, of the rolling correlation
_STEPS: Final = [round(5e6 * 2 ** (n / 2)) for n in range(16)]  # 5 ms to 0.9 s
LAGS: Final = np.array([-s for s in reversed(_STEPS)] + [0] + _STEPS, np.int64)


class Links(NamedTuple):
    """What N instruments carry: decayed sums of products of their moves in a cell of time and of the squares of these products (2, N, N);
    the latest mid changes, `tick_ts` and `tick_mid` (N, TICKS), and how many there were (N,); `lead` (N, N, 5): at [i, j] the
    correlation at the best lag, that lag (ns; > 0: j leads), z, covariance, variance of j; `turn` (1,): the next pair."""

    sums: F64
    tick_ts: I64
    tick_mid: F64
    ticks: I64
    lead: F64
    turn: I64


def new_links(n: int) -> Links:
    return Links(
        np.zeros((2, n, n)), np.zeros((n, TICKS), np.int64), np.zeros((n, TICKS)), np.zeros(n, np.int64), np.zeros((n, n, 5)),
        np.zeros(1, np.int64),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def see_tick(links, k, ts, mid):  # type: ignore[no-untyped-def]
    """The mid of instrument k has changed; of several changes in one instant the last counts."""
    n = links.ticks[k]
    if n > 0 and links.tick_ts[k, (n - 1) % TICKS] == ts:
        n -= 1
    links.tick_ts[k, n % TICKS], links.tick_mid[k, n % TICKS] = ts, mid
    links.ticks[k] = n + 1


@njit(cache=True, nogil=True)
def forget(links, k):  # type: ignore[no-untyped-def]
    """The ticks of instrument k lie too far back: its lead-lag is unknown until it has ticked again."""
    links.ticks[k] = 0
    links.lead[k] = 0.0
    links.lead[:, k] = 0.0


@njit(cache=True, nogil=True)
def end_cell(links, moves):  # type: ignore[no-untyped-def]
    """A cell of time is over, in which the instruments moved by `moves` (N,): into the decayed sums."""
    keep = 0.5 ** (1.0 / HALF_LIFE)
    for i in range(len(moves)):
        for j in range(len(moves)):
            p = moves[i] * moves[j]
            links.sums[0, i, j] = keep * links.sums[0, i, j] + p
            links.sums[1, i, j] = keep * keep * links.sums[1, i, j] + p * p


@njit(cache=True, nogil=True)
def end_silence(links, cells):  # type: ignore[no-untyped-def]
    """`cells` cells are over in which nothing moved. The sums fade by a factor of 1,000 at most: correlation outlasts a night."""
    keep = 0.5 ** min(cells / HALF_LIFE, 10.0)
    links.sums[0] *= keep
    links.sums[1] *= keep * keep


@njit(cache=True, nogil=True)
def together(links, i, j):  # type: ignore[no-untyped-def]
    """Rolling correlation of simultaneous moves, and its z under independence; 0 where either never moves."""
    v = links.sums[0, i, i] * links.sums[0, j, j]
    if not v > 1e-200 or not links.sums[1, i, j] > 1e-200:
        return 0.0, 0.0
    return min(max(links.sums[0, i, j] / math.sqrt(v), -1.0), 1.0), links.sums[0, i, j] / math.sqrt(links.sums[1, i, j])


@njit(cache=True, nogil=True)
def _changes(links, k, since, ts, dx):  # type: ignore[no-untyped-def]
    """The ticks held of instrument k from the last at or before `since` on, oldest first: stamps `ts` (n + 1,), changes `dx` (n,). -> n."""
    total = links.ticks[k]
    first = max(0, total - TICKS)
    while first + 1 < total and links.tick_ts[k, (first + 1) % TICKS] <= since:
        first += 1
    for a in range(first, total):
        ts[a - first] = links.tick_ts[k, a % TICKS]
        if a > first:
            dx[a - first - 1] = links.tick_mid[k, a % TICKS] - links.tick_mid[k, (a - 1) % TICKS]
    return max(0, total - first - 1)


@njit(cache=True, nogil=True)
def _estimate(links, i, j, scratch):  # type: ignore[no-untyped-def]
    ti, di, tj, dj, cov, square = scratch
    since = np.int64(0)
    for k in (i, j):
        if links.ticks[k] > 0:
            since = max(since, links.tick_ts[k, max(0, links.ticks[k] - TICKS) % TICKS])
    n, m = _changes(links, i, since, ti, di), _changes(links, j, since, tj, dj)
    links.lead[i, j] = 0.0
    links.lead[j, i] = 0.0
    if min(n, m) < LEAST_TICKS:
        return
    contrast(tj[: m + 1], dj[:m], ti[: n + 1], di[:n], LAGS, cov, square)
    best, vi, vj = 0, 0.0, 0.0
    for q in range(len(LAGS)):
        if abs(cov[q]) > abs(cov[best]):
            best = q
    for a in range(n):
        vi += di[a] * di[a]
    for a in range(m):
        vj += dj[a] * dj[a]
    if square[best] > 0.0 and vi > 0.0 and vj > 0.0:
        z, rho = cov[best] / math.sqrt(square[best]), cov[best] / math.sqrt(vi * vj)
        for a, b, lag, v in ((i, j, LAGS[best], vj), (j, i, -LAGS[best], vi)):
            e = links.lead[a, b]
            e[0], e[1], e[2], e[3], e[4] = min(max(rho, -1.0), 1.0), lag, z, cov[best], v


@njit(cache=True, nogil=True)
def end_round(links):  # type: ignore[no-untyped-def]
    """Estimate the lead-lag of the next few pairs again, in turns: no moment costs much however many instruments there are."""
    n = len(links.ticks)
    pairs = n * (n - 1) // 2
    if pairs == 0:
        return
    scratch = (
        np.empty(TICKS, np.int64), np.empty(TICKS), np.empty(TICKS, np.int64), np.empty(TICKS), np.empty(len(LAGS)), np.empty(len(LAGS))
    )  # fmt: skip
    for _ in range((pairs + REFRESH - 1) // REFRESH):
        p = links.turn[0]
        links.turn[0] = (p + 1) % pairs
        i = 1
        while p >= i:
            p -= i
            i += 1
        _estimate(links, i, p, scratch)


class Graph(NamedTuple):
    """How N instruments hang together now, from the past alone. All (N, N); [i, j] is the edge j -> i.

    `together`: rolling correlation of simultaneous moves. `correlation`: Hayashi-Yoshida at the lag `lag_ns` by which j leads i (negative:
    i leads); `z` is its distance from none in standard errors. `beta`: expected move of i, in currency for one unit held, per currency
    that one unit of j moves. `ahead`, `leads`: what a model expects next, in (-1, 1): their correlation, and who leads (> 0: j).
    """

    ids: tuple[str, ...]
    together: F64
    correlation: F64
    lag_ns: I64
    z: F64
    beta: F64
    ahead: F64
    leads: F64


class Hedge(NamedTuple):
    """Against one unit of `instrument` hold `ratio` units of `by` (negative: sell). `saved`: share of variance that this takes away."""

    instrument: str
    by: str
    ratio: float
    saved: float


def hedge(graph: Graph, instrument: int) -> Hedge | None:
    """The best single hedge by rolling beta: the other instrument of the greatest |correlation|, held over times longer than the lag.

    Ratio -beta minimises the variance of the pair, which it takes down by correlation^2. None where nothing correlates significantly.
    """
    rho = np.where(np.abs(graph.z[instrument]) >= SIGNIFICANT, np.abs(graph.correlation[instrument]), 0.0)
    rho[instrument] = 0.0
    by = int(rho.argmax())
    if not rho[by] > 0:
        return None
    return Hedge(graph.ids[instrument], graph.ids[by], -float(graph.beta[instrument, by]), float(min(rho[by], 1.0) ** 2))


class Contagion(NamedTuple):
    """`response` (N, N): move of i, in its standard deviations, after a move of j by one of its own. `risk` (N,): mean |response| of the
    others to a shock at each."""

    response: F64
    risk: F64


def contagion(graph: Graph, simultaneous_ns: int = 50_000_000, ridge: float = 0.05) -> Contagion:
    """Generalised impulse response through the graph (Pesaran and Shin 1998), a shock of one standard deviation at each node.

    At once, the others move by their expectation given the shock: the column of `together` (R). Later it goes along the edges of
    leaders, significant ones that lead by `simultaneous_ns` or more: psi_0 = R e_j, psi_k+1 = W psi_k for N hops, response = sum of psi_k.
    Row i of W are the coefficients of i's later move on the moves of all its leaders L together, (R_LL + ridge I)^-1 c_L with c_L the
    lagged correlations, so that what one leader passes on is not counted twice; rows beyond sum |W| = 1 are scaled down to it.
    """
    n = len(graph.ids)
    together = np.clip(np.nan_to_num(graph.together), -1.0, 1.0)
    np.fill_diagonal(together, 1.0)
    along = np.zeros((n, n))
    for i in range(n):
        leaders = np.flatnonzero((np.abs(graph.z[i]) >= SIGNIFICANT) & (graph.lag_ns[i] >= simultaneous_ns) & (np.arange(n) != i))
        if len(leaders):
            among = together[np.ix_(leaders, leaders)] + ridge * np.eye(len(leaders))
            along[i, leaders] = np.linalg.lstsq(among, np.clip(graph.correlation[i, leaders], -1.0, 1.0), rcond=None)[0]
            along[i] /= max(1.0, np.abs(along[i]).sum())
    response, hop = together.copy(), together
    for _ in range(n):
        hop = along @ hop
        response += hop
    others = np.abs(response - np.diag(np.diag(response)))
    return Contagion(response, others.sum(axis=0) / max(1, n - 1))
