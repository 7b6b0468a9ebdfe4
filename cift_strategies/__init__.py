"""The ensemble as NautilusTrader actors and a strategy, and the runners around them.

`InferencePipeline` and `PipelineConfig` are for programs that want predictions alone; see :mod:`cift_strategies.pipeline`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cift_strategies.pipeline import InferencePipeline, PipelineConfig

__all__ = ["InferencePipeline", "PipelineConfig"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from cift_strategies import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
