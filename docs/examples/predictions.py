"""Print what the ensemble says, as it says it: `python -m uv run python docs/examples/predictions.py`. Without a key: the demo market.

With one: PipelineConfig(polygon_api_key=..., symbols=["AAPL", "MSFT"], artifacts="DIR"), with models that were trained on these.
Settings can be given as JSON too: `predictions.py '{"symbols": ["KESTR.XNAS"], "speed": 20}'`.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, from wherever this is started

from cift_strategies import InferencePipeline, PipelineConfig

MOST = 20  # predictions that are printed
SETTINGS = {"speed": 5, "min_agreement": 2, "confidence_threshold": 0.4}


async def main(**settings: Any) -> None:
    pipeline = InferencePipeline(PipelineConfig(**(SETTINGS | settings)))

    @pipeline.on_prediction
    async def told(result) -> None:
        p = result.prediction
        if p.should_trade:
            way = "buy" if p.direction > 0 else "sell"
            print(
                f"{result.symbol}: {way} {p.position_size:.1%} of the full position, confidence {p.confidence:.2f}, regime {p.regime}, "
                f"stop {p.stop_loss:.3f}, target {p.take_profit:.3f}, reward/risk {p.risk_reward:.2f}, {result.total_latency_ms:.1f} ms"
            )
        else:
            print(f"{result.symbol}: nothing to do ({p.reason}), {result.total_latency_ms:.1f} ms")
        if pipeline.delivered + 1 >= MOST:
            pipeline.stop()

    await pipeline.start()


if __name__ == "__main__":
    asyncio.run(main(**json.loads(sys.argv[1] if sys.argv[1:] else "{}")))
