"""Networks: Teacher and Student around any module, building by name, weights from files, feature layers."""

from kd.models.weights import weights_metadata
from kd.models.wrappers import Output, Student, Teacher

__all__ = ["Output", "Student", "Teacher", "weights_metadata"]
