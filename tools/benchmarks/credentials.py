"""What one paid request costs each side in proofs, on one core, without disk or network.

The request is an insertion: two credentials presented, two asked for. Each stage is timed in
batches, all stages in turn; its figure is the median of its least disturbed batch, because a
shared machine can only add to the others.
"""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable

from hpkvfs.protocol.credential import Issuer, IssuerParameters, Statement, parse, prepare
from hpkvfs.protocol.epoch import NO_EPOCH, EpochParameters
from hpkvfs.protocol.group import GV, ORDER, multiply, multiply_secret
from hpkvfs.protocol.tariff import Operation, Tariff

ROUNDS = 12
BATCH = 15
AMOUNT = 1_000_000


def run(as_json: bool) -> dict[str, float]:
    """Milliseconds and bytes: client (prove + finish), server (parse + verify + issue), stages."""
    issuer = Issuer.generate(secrets.token_bytes)
    epoch = EpochParameters(0, Tariff(), issuer.parameters, NO_EPOCH)
    parameters = IssuerParameters.decode(issuer.parameters.encoded)
    start = time.perf_counter()
    parameters.verify()
    epoch_check = (time.perf_counter() - start) * 1e3

    stages, request_bytes, reply_bytes = _stages(issuer, parameters, epoch)
    if not as_json:
        print(f"{ROUNDS} rounds of {BATCH} runs of each stage; milliseconds of the best round")
    timed = _best_medians(stages)
    return {
        "client_ms": round(timed["prove_ms"] + timed["finish_ms"], 3),
        "server_ms": round(timed["parse_ms"] + timed["verify_ms"] + timed["issue_ms"], 3),
        "request_bytes": request_bytes,
        "reply_bytes": reply_bytes,
        **{name: round(value, 3) for name, value in timed.items()},
        **_speed_of_the_machine(),
        "epoch_bytes": len(epoch.encode()),
        "epoch_check_ms": round(epoch_check, 3),
    }


def _speed_of_the_machine() -> dict[str, float]:
    """Microseconds of the two multiplications that all other figures are made of."""
    point, scalar = GV.point, ORDER // 3
    times = _best_medians(
        {
            "multiply_us": lambda: [multiply(point, scalar) for _ in range(10)],
            "multiply_secret_us": lambda: [multiply_secret(point, scalar) for _ in range(10)],
        }
    )
    return {name: round(value * 100, 1) for name, value in times.items()}


def _stages(
    issuer: Issuer, parameters: IssuerParameters, epoch: EpochParameters
) -> tuple[dict[str, Callable[[], object]], int, int]:
    """Each stage of an honest insertion, ready to be repeated, and the two sizes."""
    rng = secrets.token_bytes
    buy = Statement(epoch.digest, Operation.ISSUE, b"voucher", AMOUNT)
    bought = prepare(parameters, buy, (), (AMOUNT, 0), rng)
    held = bought.finish(parameters, issuer.issue(buy, parse(bought.request, 0)))

    insert = Statement(epoch.digest, Operation.INSERT, bytes(65), -10)
    halves = AMOUNT // 2 - 5, AMOUNT // 2 - 5
    draft = prepare(parameters, insert, held, halves, rng)
    request = parse(draft.request, 2)
    issuer.verify(insert, request)
    reply = issuer.issue(insert, request)
    draft.finish(parameters, reply)
    stages: dict[str, Callable[[], object]] = {
        "prove_ms": lambda: prepare(parameters, insert, held, halves, rng),
        "finish_ms": lambda: draft.finish(parameters, reply),
        "parse_ms": lambda: parse(draft.request, 2),
        "verify_ms": lambda: issuer.verify(insert, request),
        "issue_ms": lambda: issuer.issue(insert, request),
    }
    return stages, len(draft.request), len(reply)


def _best_medians(stages: dict[str, Callable[[], object]]) -> dict[str, float]:
    best = dict.fromkeys(stages, float("inf"))
    for _ in range(ROUNDS):
        for name, stage in stages.items():
            best[name] = min(best[name], statistics.median(_times(stage)))
    return best


def _times(stage: Callable[[], object]) -> list[float]:
    """Milliseconds of each of BATCH runs."""
    times = []
    for _ in range(BATCH):
        start = time.perf_counter()
        stage()
        times.append((time.perf_counter() - start) * 1e3)
    return times
