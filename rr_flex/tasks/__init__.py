"""Long-context tasks: a model's scores dense and with RRAttention, side by side. Imported only by `rr-flex tasks`."""
