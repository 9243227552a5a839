"""Published distillation methods, one file per family."""
