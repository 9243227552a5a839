"""Networks: Teacher and Student around any module, building by name, weights from files, feature layers."""

from typing import TYPE_CHECKING

from kd.models.wrappers import Output, Student, Teacher

if TYPE_CHECKING:
    from kd.models.weights import weights_metadata

__all__ = ["Output", "Student", "Teacher", "weights_metadata"]


def __getattr__(name: str):
    if name == "weights_metadata":  # loaded on first use: Teacher and Student need torch only, this needs safetensors
        from kd.models.weights import weights_metadata

        return weights_metadata
    raise AttributeError(f"module 'kd.models' has no attribute {name!r}")
