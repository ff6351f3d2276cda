"""The end of a fit: the lens from the sums of all processes, and the account of what was done."""

import json
import logging
import math
from typing import NamedTuple

from fisher_vmap.errors import UserError
from fisher_vmap.lens.flags import PT_NAME, SAFETENSORS_NAME
from fisher_vmap.lens.folder import READOUTS, read_info, write_info
from fisher_vmap.lens.jacobian_lens import JacobianLens
from fisher_vmap.lens.opening import Fit
from fisher_vmap.lens.sums import Spread
from fisher_vmap.results.files import folder_lock

OWN_SETTINGS = ("skip_first", "max_length")  # in the lens's metadata

log = logging.getLogger("fisher_vmap")


class Counted(NamedTuple):
    """What was done now.

    Attributes:
        computed: prompts that were used now.
        stored: prompts that were used before.
        seconds: that those of now took.
        stopped: whether `until` was reached before the end of the data.
    """

    computed: int
    stored: int
    seconds: float
    stopped: bool


class Summary(NamedTuple):
    """What a fit did.

    Attributes:
        lens: the lens; None while shards of other processes are missing.
        spread: how well each layer is known.
        did: what was done now.
        skipped: prompt index -> why it has no matrix; of the whole fit.
        failed: likewise.
    """

    lens: JacobianLens | None
    spread: dict[str, Spread]
    did: Counted
    skipped: dict[int, str]
    failed: dict[int, str]


def finish(fit: Fit, total: int | None, counted: Counted) -> Summary:
    """Write the lens if all shards of `total` prompts are stored; None: whatever is stored.

    Raises:
        UserError: no prompt has a matrix, more are stored than `total`, or a file cannot be written.
    """
    with folder_lock(fit.folder):
        shards = fit.parts()
        skipped = {i: why for _, shard in shards.values() for i, why in shard.skipped.items()}
        failed = {i: why for _, shard in shards.values() for i, why in shard.failed.items()}
        there = sum(shard.prompts for _, shard in shards.values())
        size = fit.settings.shard_size
        beyond = total is not None and max(shards, default=-1) >= -(-total // size)  # of another part of the data
        if total is not None and (there > total or beyond):
            raise UserError(
                f"{fit.folder} holds sums of more prompts than are asked for, "
                f"{max(there, max(shards) * size + 1)} of {total}, and a sum cannot be "
                "taken apart; raise num_prompts, or use another --output_dir"
            )
        if total is not None and there < total:
            log.info(
                "%d of %d prompts are not in the sums yet; the process that computes the last shard of %d writes the "
                "lens",
                total - there, total, -(-total // size),
            )  # fmt: skip
            return Summary(None, {}, counted, skipped, failed)
        sums = fit.joined() if shards else None
        if sums is None or not sums.prompts:
            reasons = {**skipped, **failed}
            first = f" (prompt {min(reasons)}: {reasons[min(reasons)]})" if reasons else ""
            raise UserError(f"no prompt has a matrix{first}; give longer texts, or a lower skip_first")
        spread = {layer: sums.spread(layer) for layer in sorted(fit.fisher.layers, key=fit.numbers.__getitem__)}
        info = dict(read_info(fit.folder) or {})
        metadata = {name: info[name] for name in ("model", "data", "versions", "precision")} | {
            name: getattr(fit.settings, name) for name in OWN_SETTINGS
        }
        metadata = json.loads(json.dumps(metadata))
        lens = JacobianLens(
            {fit.numbers[layer]: sums.mean(layer) for layer in fit.fisher.layers},
            sums.prompts,
            (sums.metric / sums.prompts).float(),
            {fit.numbers[layer]: one.standard_error for layer, one in spread.items() if sums.prompts > 1},
            metadata,
        )
        if counted.computed and (fit.folder / READOUTS).exists():
            (fit.folder / READOUTS).unlink()
            log.info("%s was of the lens before and is removed; --read makes it again", fit.folder / READOUTS)
        lens.save(fit.folder / PT_NAME)
        lens.save(fit.folder / SAFETENSORS_NAME)
        found = {
            "n_prompts": sums.prompts,
            "stopped_at": fit.settings.until if counted.stopped else None,
            "spread": {layer: {k: _number(v) for k, v in one._asdict().items()} for layer, one in spread.items()},
            "skipped": skipped,
            "failed": failed,
        }
        write_info(fit.folder, info | {"found": found})
    return Summary(lens, spread, counted, skipped, failed)


def _number(value: float) -> float | None:
    return None if math.isnan(value) else float(f"{value:.6g}")
