"""Merges in few bits: nothing that heads have learned is lost, and all ranks hold the same bits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lte_scale.config.schema import Config
from lte_scale.exchange import FactorExchange
from lte_scale.merge import Merger
from tests.dist.equality import Run
from tests.dist.test_equality import PLACES, configuration
from tests.harness import DistributedPool

WINDOWS = 10
Named = dict[str, Tensor]


@dataclass
class Account:
    """Of one rank after ten windows.

    Attributes:
        given: by head, all that it has learned less what it still has, of every weight and of all replica parameters.
        masters: by weight, where this rank's part starts, and by how much it has moved; with its bits in the end.
        unsent: by weight, what the mean over nodes still lacks of this rank's messages, in full size.
    """

    given: dict[int, Named]
    masters: dict[str, tuple[int, Tensor, Tensor]]
    unsent: Named
    replicas: tuple[Tensor, Tensor]
    unsent_replicas: Tensor
    copies: Named


def in_precision(precision: str, config: Config) -> Config:
    return replace(config, merge=replace(config.merge, precision=precision))


def as_sent(run: Run) -> Named:
    """By weight, A of this rank's heads as a merge takes it [H, R, I]."""
    found, here = {}, [head % run.topology.heads_per_node for head in run.heads.ids]
    for bucket in run.merger.buckets:
        packed = run.merger.exchange.pack(bucket.names)
        if bucket.path == "factor":
            packed = run.merger.exchange.rounded(packed, bucket.names)
        factors = run.merger.exchange.within_node(packed, bucket.names)
        for name, (A, _) in run.merger.products.by_weight(bucket, factors).items():
            found[name] = A[here].view_as(run.heads.linears[name].A).clone()
    return found


def products(run: Run, A: Named) -> dict[int, Named]:
    """What every head of this rank adds to its base, s (B A - B' A'), and its replica parameters; in float64.

    A under reset is that given: what a head goes on with is what it had, and it is no loss of the merge's.
    """
    found: dict[int, Named] = {}
    for index, head in enumerate(run.heads.ids):
        found[head] = {}
        for name, layer in run.heads.linears.items():
            used = A[name] if layer.A_prev is None else layer.A
            delta = layer.B[index].detach().double() @ used[index].detach().double()
            if layer.A_prev is not None and layer.B_prev is not None:
                delta -= layer.B_prev[index].double() @ layer.A_prev[index].double()
            found[head][name] = layer.scale * delta.flatten()
        replicas = [p.detach().double().view(len(run.heads.ids), -1)[index] for p in run.heads.replicas.values()]
        found[head]["replicas"] = torch.cat(replicas)
    return found


def learn(run: Run, step: int) -> None:
    """Change every parameter of every head by something of its own size, the same on all ranks of a head."""
    for index, head in enumerate(run.heads.ids):
        generator = torch.Generator().manual_seed(1000 * step + head)
        for parameter in run.heads.parameters().values():
            row = parameter.detach().view(len(run.heads.ids), -1)[index]
            row += 0.01 * torch.randn(row.shape, generator=generator)


def unsent(merger: Merger) -> Named:
    nodes, node = merger.topology.nodes, merger.topology.node
    missing = merger.dense.unsent()
    found = {}
    for name, own in merger.ownership.items():
        found[name] = torch.zeros(own.shape[0] * own.shape[1], dtype=torch.float64)
        if f"{name}/sent" in missing:
            for (start, stop), row in zip(merger.dense.parts[name], missing[f"{name}/sent"], strict=True):
                found[name][start:stop] += row[: stop - start].double() / nodes
        if f"{name}/shared" in missing:
            start, stop = merger.dense.parts[name][node]
            found[name][start:stop] += missing[f"{name}/shared"][: stop - start].double()
    return found


def unsent_replicas(merger: Merger, size: int) -> Tensor:
    found, feedback = torch.zeros(size, dtype=torch.float64), merger.replicas.feedback
    if feedback is not None:
        nodes, node = merger.topology.nodes, merger.topology.node
        rows = feedback.unsent.double() / nodes
        rows[node] += feedback.unshared.double()
        part = -(-size // merger.topology.ranks_per_node)
        start = merger.topology.local_rank * part
        here = found[start : start + part]
        here += rows.flatten()[: here.numel()]
    return found


def masters(run: Run) -> Named:
    with run.merger.editable():
        return {name: master.clone() for name, master in run.merger.outer.masters.items()}


@torch.no_grad()
def account(rank: int, config: Config) -> Account:
    run = Run(config)
    merger, replicas = run.merger, run.merger.replicas.outer.masters
    first, first_replicas = masters(run), torch.cat(list(replicas.values()))
    replicas_after = {head: named["replicas"] for head, named in products(run, as_sent(run)).items()}
    given: dict[int, Named] = {head: {} for head in run.heads.ids}
    for step in range(1, WINDOWS * config.merge.every + 1):
        learn(run, step)
        if merger.due(step):
            A = as_sent(run)
            before = products(run, A)
            merger.merge(step)
            for head, named in products(run, A).items():
                for name, value in named.items():
                    # Replica parameters are all handed over: the head goes on from what it then gets.
                    kept = replicas_after[head] if name == "replicas" else value
                    given[head][name] = given[head].get(name, 0.0) + before[head][name] - kept
                replicas_after[head] = named["replicas"]
    with merger.editable() as shards:
        copies = {name: shard.clone() for name, shard in shards.items()}
    last, last_replicas = masters(run), torch.cat(list(replicas.values()))
    parts = {n: (own.own[0], last[n].double() - first[n].double(), last[n]) for n, own in merger.ownership.items()}
    moved = (last_replicas.double() - first_replicas.double(), last_replicas)
    return Account(given, parts, unsent(merger), moved, unsent_replicas(merger, len(last_replicas)), copies)


def assert_conserved(accounts: list[Account]) -> None:
    """Masters have moved by the mean of what heads have given away, less what messages have still to say."""
    given = {head: named for account in accounts for head, named in account.given.items()}
    for name in accounts[0].masters:
        learned = torch.stack([named[name] for named in given.values()]).mean(0)
        missing = sum(account.unsent[name] for account in accounts)
        for account in accounts:
            start, moved, _ = account.masters[name]
            mine = slice(start, start + len(moved))
            torch.testing.assert_close(
                moved, (learned - missing)[mine], rtol=1e-5, atol=1e-5 * learned.abs().max().item()
            )
    learned = torch.stack([named["replicas"] for named in given.values()]).mean(0)
    missing = torch.stack([account.unsent_replicas for account in accounts]).sum(0)
    for account in accounts:
        torch.testing.assert_close(account.replicas[0], learned - missing, rtol=1e-5, atol=1e-6)


def assert_same_bits(accounts: list[Account], place: tuple[str, str]) -> None:
    for account in accounts:
        assert torch.equal(account.replicas[1], accounts[0].replicas[1])
    for first, second in ((0, 2), (1, 3)):
        for name, (start, _, values) in accounts[first].masters.items():
            if place[0] == "node":
                assert start == accounts[second].masters[name][0]
                assert torch.equal(values, accounts[second].masters[name][2]), name
            elif place[1] == "node":
                assert torch.equal(accounts[first].copies[name], accounts[second].copies[name]), name


def cases() -> list[tuple[str, str, int, tuple[str, str], str, int]]:
    """All of precision x mode x place x path; placements of heads take turns. Two levels where there can be."""
    chosen = []
    for number, (precision, mode, place, path) in enumerate(
        itertools.product(
            ("bf16", "int8", "int4"), ("reset", "resetless"), PLACES[::2][:2] + PLACES[3:4], ("factor", "dense")
        )
    ):
        heads = (1, 2, 4)[(number + number // 6) % 3]
        chosen.append((precision, mode, heads, place, path, 0))
        if place == PLACES[0]:
            chosen.append((precision, mode, (1, 2, 4)[number % 3], place, path, 1))
    return chosen


@pytest.mark.parametrize("case", cases(), ids=lambda c: f"{c[0]}-{c[1]}-h{c[2]}-{c[3][0]}-{c[3][1]}-{c[4]}-l{c[5]}")
def test_nothing_is_lost_and_all_ranks_agree(
    pool4: DistributedPool, case: tuple[str, str, int, tuple[str, str], str, int]
) -> None:
    precision, mode, heads, place, path, local_every = case
    config = in_precision(precision, configuration(mode, heads, place, path, local_every, "average"))
    accounts = pool4.run(account, config, ranks_per_node=2)
    assert_conserved(accounts)
    assert_same_bits(accounts, place)


def test_what_is_conserved_is_not_what_is_sent(pool4: DistributedPool) -> None:
    """Else these tests could not fail: at 4 bits messages miss a tenth of the last window."""
    config = in_precision("int4", configuration("reset", 2, PLACES[0], "dense", 0, "average"))
    accounts = pool4.run(account, config, ranks_per_node=2)
    for one in accounts:
        one.unsent = {name: torch.zeros_like(value) for name, value in one.unsent.items()}
    with pytest.raises(AssertionError):
        assert_conserved(accounts)


def factors_that_arrive(rank: int, config: Config) -> list[tuple[Tensor, Tensor]]:
    """A and B of the heads of all nodes, sent and received."""
    run = Run(config)
    learn(run, 1)
    found = []
    for bucket in run.merger.buckets:
        packed = run.merger.exchange.pack(bucket.names).unsqueeze(0)
        exact = FactorExchange(run.heads, run.collectives).between_nodes(packed, bucket.names)
        few = run.merger.exchange.between_nodes(packed, bucket.names)
        found += [*zip(exact, few, strict=True)]
    return found


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.003), ("int8", 0.008), ("int4", 0.14)])
def test_factors_arrive_as_near_as_their_bits_allow(
    pool4: DistributedPool, heads: int, precision: str, error: float
) -> None:
    for mode in ("reset", "resetless"):
        config = in_precision(precision, configuration(mode, heads, PLACES[0], "factor", 0, "average"))
        for arrived in pool4.run(factors_that_arrive, config, ranks_per_node=2):
            for number, (sent, received) in enumerate(arrived):
                of_a = mode == "reset" and number % 2 == 0
                assert 0 < (sent - received).norm() <= (min(error, 0.008) if of_a else error) * sent.norm()


@pytest.mark.parametrize("mode", ["reset", "resetless"])
@pytest.mark.parametrize("path", ["factor", "dense"])
def test_a_master_in_few_bits_stays_near_the_one_in_fp32(pool4: DistributedPool, mode: str, path: str) -> None:
    """What is missing does not grow: after ten windows it is a small part of how far the masters have moved."""
    config = configuration(mode, 2, PLACES[0], path, 0, "average")
    whole = pool4.run(account, config)
    for precision, error in (("int8", 0.02), ("int4", 0.25)):
        for exact, rounded in zip(whole, pool4.run(account, in_precision(precision, config)), strict=True):
            for name, (_, moved, _) in exact.masters.items():
                assert (rounded.masters[name][1] - moved).norm() <= error * moved.norm(), name
