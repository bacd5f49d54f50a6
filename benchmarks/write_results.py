"""Makes docs/results.md from the logs of all benchmarks.

python benchmarks/write_results.py
"""

from __future__ import annotations

from pathlib import Path

import decomposition
import dependence
import fine_tuning
import hybrid_claim
import policy_search
import speed
import train_throughput
import training_free
import vtp_cifar10

LOGS = Path("benchmarks/results")


def main() -> None:
    sections = (
        training_free.page(training_free.read(LOGS / "training_free.jsonl")),
        speed.page(training_free.read(LOGS / "speed.jsonl")),
        fine_tuning.page(training_free.read(LOGS / "fine_tuning.jsonl")),
        decomposition.page(training_free.read(LOGS / "decomposition.jsonl")),
        hybrid_claim.page(training_free.read(LOGS / "hybrid_claim.jsonl")),
        policy_search.page(training_free.read(LOGS / "policy_search.jsonl")),
        train_throughput.page(training_free.read(LOGS / "train_throughput.jsonl")),
        dependence.page(training_free.read(LOGS / "dependence.jsonl")),
        vtp_cifar10.page(training_free.read(LOGS / "vtp_cifar10.jsonl")),
    )
    text = "\n".join(["# Results\n", *(section for section in sections if section)])
    Path("docs/results.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
