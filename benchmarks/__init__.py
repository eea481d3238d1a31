"""Honest speed: named workloads, interleaved measurements behind a parity gate, rows in results/, a log of what was tried."""
