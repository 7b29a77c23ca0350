"""Property tests of the theorems in docs/design/pcie-bounds.md, by their numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from missile.errors import MisuseError
from missile.pcie.policy import MAX_RESERVED, FairLink, Granularity
from missile.pcie.weights import MIB, NICE_ZERO, Share, nice_weight

UNIT = NICE_ZERO  # virtual units per byte at weight 1
SMALL = Granularity(solo=64, shared=32, short=8, credit=16, latency_sensitive_credit=128)


@st.composite
def shares(draw: st.DrawFn, *, latency_sensitive: bool | None = None) -> Share:
    return Share(
        weight=draw(st.sampled_from([0.05, 0.33, 1.0, 2.0, 4.0, 10.0, 86.7])),
        latency_sensitive=draw(st.booleans()) if latency_sensitive is None else latency_sensitive,
    )


@dataclass
class Harness:
    """A link whose tenants wake and sleep at will; everything issued is charged at once."""

    link: FairLink
    names: list[str]
    granularity: Granularity = SMALL
    served: dict[str, int] = field(default_factory=dict)

    def step(self, action: tuple[str, int, int], keep: frozenset[str] = frozenset()) -> None:
        kind, who, amount = action
        name = self.names[who % len(self.names)]
        if kind == "wake":
            self.link.wake(name, 0)
        elif kind == "sleep" and name not in keep:
            self.link.sleep(name, 0)
        elif (pick := self.link.pick(0)) is not None:
            nbytes = 1 + amount % pick.quantum
            self.link.charge(pick, nbytes)
            self.served[pick.tenant] = self.served.get(pick.tenant, 0) + nbytes


def actions(size: int = 120) -> st.SearchStrategy[list[tuple[str, int, int]]]:
    kinds = st.sampled_from(["wake", "sleep", "serve", "serve", "serve", "serve"])
    return st.lists(st.tuples(kinds, st.integers(0, 9), st.integers(0, 1000)), min_size=1, max_size=size)


def harness(all_shares: list[Share]) -> Harness:
    link = FairLink(1e9, SMALL)
    names = [f"t{index}" for index in range(len(all_shares))]
    for name, share in zip(names, all_shares, strict=True):
        link.admit(name, share)
    return Harness(link, names)


def credit(share: Share) -> int:
    return UNIT * (SMALL.latency_sensitive_credit if share.latency_sensitive else SMALL.credit)


def chunk(share: Share, largest: int = SMALL.solo) -> float:
    return largest * UNIT * NICE_ZERO / share.units


@given(st.lists(shares(), min_size=1, max_size=6), actions())
def test_lemma_1_virtual_runtimes_stay_within_a_chunk_and_the_credit(all_shares: list[Share], acts) -> None:
    h = harness(all_shares)
    before = 0
    for action in acts:
        h.step(action)
        assert h.link.min_vruntime >= before
        before = h.link.min_vruntime
        for name in h.names:
            share = h.link.share(name)
            assert h.link.lag(name) <= chunk(share) + 1
            if name in {flow.name for flow in h.link._awake}:
                assert h.link.lag(name) >= -credit(share)


@given(st.lists(shares(), min_size=2, max_size=6), actions(200))
def test_theorem_1_lag_of_two_backlogged_tenants(all_shares: list[Share], acts) -> None:
    h = harness(all_shares)
    a, b = all_shares[:2]
    for name in ("t0", "t1"):
        h.link.wake(name, 0)
    both = [0.0]
    spent = [0.0] if max(credit(a), credit(b)) == 0 else []
    for action in acts:
        h.step(action, keep=frozenset({"t0", "t1"}))
        gap = h.served.get("t0", 0) * UNIT * NICE_ZERO / a.units - h.served.get("t1", 0) * UNIT * NICE_ZERO / b.units
        both.append(gap)
        if spent or (h.link.lag("t0") >= 0 and h.link.lag("t1") >= 0):
            spent.append(gap)
    chunks = chunk(a) + chunk(b) + 4
    assert max(both) - min(both) <= chunks + credit(a) + credit(b)
    if spent:  # from when neither has credit left: the bound is the two chunks alone
        assert max(spent) - min(spent) <= chunks


@given(st.lists(shares(), min_size=1, max_size=6), actions())
def test_theorem_2_work_conserving(all_shares: list[Share], acts) -> None:
    h = harness(all_shares)
    awake: set[str] = set()
    for action in acts:
        h.step(action)
        name = h.names[action[1] % len(h.names)]
        if action[0] == "wake":
            awake.add(name)
        elif action[0] == "sleep":
            awake.discard(name)
        pick = h.link.pick(0)
        assert (pick is not None) == bool(awake)
        assert pick is None or pick.tenant in awake


@given(st.lists(shares(), min_size=2, max_size=6), actions(300))
def test_theorem_3_no_starvation(all_shares: list[Share], acts) -> None:
    """While t0 waits, the others get at most a bounded number of bytes, however they wake and sleep."""
    h = harness(all_shares)
    for action in acts[:50]:
        h.step(action)
    h.link.wake("t0", 0)
    mine = all_shares[0]
    bound = sum(
        share.units / NICE_ZERO * (chunk(mine) + credit(share)) / UNIT + SMALL.solo + 2 for share in all_shares[1:]
    )
    waited = 0
    for action in acts:
        before = dict(h.served)
        h.step(action, keep=frozenset({"t0"}))
        if h.served.get("t0", 0) > before.get("t0", 0):
            waited = 0
        else:
            waited += sum(h.served.values()) - sum(before.values())
        assert waited <= bound


@given(st.integers(1, 9), st.integers(1, 5), st.integers(2, 200))
def test_sleeping_gains_no_more_than_the_credit(weight: int, rival: int, naps: int) -> None:
    """A tenant that naps after every chunk gets no more than its share of a busy link and one credit."""
    link = FairLink(1e9, SMALL)
    link.admit("napper", Share(weight=weight))
    link.admit("steady", Share(weight=rival))
    link.wake("steady", 0)
    served = {"napper": 0, "steady": 0}
    for _ in range(naps):
        link.wake("napper", 0)
        pick = link.pick(0)
        assert pick is not None
        link.charge(pick, pick.quantum)
        served[pick.tenant] += pick.quantum
        if pick.tenant == "napper":
            link.sleep("napper", 0)
    assert served["napper"] / weight <= (served["steady"] + SMALL.solo) / rival + SMALL.solo / weight + SMALL.credit


@given(
    rate=st.integers(1, 10**6),
    burst=st.integers(8, 64),
    gaps=st.lists(st.integers(0, 10**8), min_size=1, max_size=120),
)
def test_theorem_4_rate_limit(rate: int, burst: int, gaps: list[int]) -> None:
    link = FairLink(1e9, SMALL)
    link.admit("limited", Share(limit=float(rate), burst_bytes=burst))
    link.wake("limited", 0)
    now, issued = 0, [(0, 0)]
    for gap in gaps:
        now += gap
        if (pick := link.pick(now)) is not None:
            link.charge(pick, pick.quantum)
            issued.append((now, issued[-1][1] + pick.quantum))
        else:
            again = link.next_eligible(now)
            assert again is not None
            assert again > now
            assert link.pick(again - 1) is None
            assert link.pick(again) is not None
            now = again
    for (s, before), (t, after) in itertools.combinations(issued, 2):
        # bytes issued after s, up to and with t
        assert after - before <= burst + rate * (t - s) / 1e9


@settings(max_examples=60)
@given(
    minimums=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.05, 1.0, 86.7]), min_size=5, max_size=5),
    chunks=st.integers(200, 600),
)
def test_theorem_5_guaranteed_minimums(minimums: list[int], weights: list[float], chunks: int) -> None:
    """Minimums hold beside a flood over any interval, to within two chunks and a blocking one."""
    rate = 1_000_000_000  # one byte per ns
    scale = 0.94 * rate / max(sum(minimums), 100)
    link = FairLink(rate, Granularity(solo=64, shared=64, short=64, credit=0, latency_sensitive_credit=0))
    promised = {f"m{index}": minimum * scale for index, minimum in enumerate(minimums)}
    for index, (name, minimum) in enumerate(promised.items()):
        link.admit(name, Share(weight=weights[index], minimum=minimum))
    link.admit("flood", Share(weight=weights[4]))
    for name in link.tenants():
        link.wake(name, 0)
    now = 0
    served = dict.fromkeys(promised, 0)
    best = dict.fromkeys(promised, 0.0)
    flood = 0
    for _ in range(chunks):
        pick = link.pick(now)
        assert pick is not None
        for name, minimum in promised.items():
            ahead = served[name] - minimum * now / 1e9
            best[name] = max(best[name], ahead)
            assert best[name] - ahead <= 2 * 64 + minimum * 64 / rate + 2
        link.charge(pick, pick.quantum)
        if pick.tenant in served:
            served[pick.tenant] += pick.quantum
        else:
            flood += pick.quantum
        now += pick.quantum * 1_000_000_000 // rate
    assert flood > 0  # the unpromised part is never all taken


@pytest.mark.parametrize("weights", [(1, 1), (1, 2, 4), (1, 10), (nice_weight(0), nice_weight(5))])
def test_shares_follow_weights_over_any_100_ms(weights: tuple[float, ...]) -> None:
    rate, window = 54e9, 0.1
    link = FairLink(rate, Granularity())
    for index, weight in enumerate(weights):
        link.admit(str(index), Share(weight=weight))
        link.wake(str(index), 0)
    per_window = int(window * rate)
    log: list[tuple[str, int]] = []
    while sum(n for _, n in log) < 3 * per_window:
        pick = link.pick(0)
        assert pick is not None
        link.charge(pick, pick.quantum)
        log.append((pick.tenant, pick.quantum))
    for start in range(0, len(log) // 2, 37):
        got = dict.fromkeys(map(str, range(len(weights))), 0)
        for name, nbytes in log[start:]:
            if sum(got.values()) >= per_window:
                break
            got[name] += nbytes
        for index, weight in enumerate(weights):
            ideal = weight / sum(weights)
            assert got[str(index)] / sum(got.values()) == pytest.approx(ideal, rel=0.02)


def test_a_waking_latency_sensitive_tenant_goes_first_until_its_credit_is_spent() -> None:
    link = FairLink(54e9)
    for name in ("a", "b", "c"):
        link.admit(name, Share())
        link.wake(name, 0)
    link.admit("ls", Share(latency_sensitive=True))
    for _ in range(50):
        pick = link.pick(0)
        assert pick is not None
        assert pick.quantum == 2 * MIB
        link.charge(pick, pick.quantum)
    link.wake("ls", 0)
    first = []
    for _ in range(12):
        pick = link.pick(0)
        assert pick is not None
        first.append(pick.tenant)
        link.charge(pick, pick.quantum)
    assert first[:4] == ["ls"] * 4  # 8 MiB of credit
    assert first[4:].count("ls") < 4  # then its share


def test_long_runs_do_not_lose_fractions() -> None:
    link = FairLink(1e9)
    link.admit("odd", Share(weight=1 / 3))
    link.wake("odd", 0)
    for _ in range(1000):
        pick = link.pick(0)
        assert pick is not None
        link.charge(pick, 7)
    units = Share(weight=1 / 3).units
    link.pick(0)
    assert link.min_vruntime == 7000 * UNIT * NICE_ZERO // units


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Share(weight=0), "weight must be a positive number, not 0"),
        (lambda: Share(weight=-1), "weight must be a positive number, not -1"),
        (lambda: Share(weight=float("nan")), "weight"),
        (lambda: Share(minimum=-5), "minimum"),
        (lambda: Share(limit=0), "rate limit"),
        (lambda: Share(limit=5, minimum=6), "below the guaranteed minimum"),
        (lambda: Share(burst_bytes=0), "burst"),
        (lambda: nice_weight(20), "-20..19"),
        (lambda: Granularity(short=0), "chunk sizes"),
        (lambda: FairLink(0), "capacity"),
    ],
)
def test_bad_entitlements_are_refused_by_name(make, says: str) -> None:
    with pytest.raises(MisuseError, match=says):
        make()


def test_minimums_above_the_link_are_refused_and_change_nothing() -> None:
    link = FairLink(10e9)
    link.admit("a", Share(minimum=6e9))
    with pytest.raises(MisuseError, match=r"'b' sum to 10 GB/s"):
        link.admit("b", Share(minimum=4e9))
    assert link.tenants() == ("a",)
    link.admit("b", Share(minimum=MAX_RESERVED * 10e9 - 6e9))
    link.remove("a")
    link.admit("c", Share(minimum=5e9))
    with pytest.raises(MisuseError, match="Unknown PCIe tenant 'a'; registered: b, c"):
        link.wake("a", 0)
    with pytest.raises(MisuseError, match="already registered"):
        link.admit("b", Share())


def test_nice_levels_follow_linux() -> None:
    assert nice_weight(0) == 1.0
    assert nice_weight(5) * 1024 == 335
    assert nice_weight(-20) * 1024 == 88761
    assert nice_weight(19) * 1024 == 15
    ratios = [nice_weight(n) / nice_weight(n + 1) for n in range(-20, 19)]
    assert all(1.15 < ratio < 1.35 for ratio in ratios)
