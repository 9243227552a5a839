"""Networks: Teacher and Student, building by name, weights from files, feature layers."""
