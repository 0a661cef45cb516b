"""Blind pairwise judgements: what people or judges said of pairs, and what that says of the systems behind them."""
