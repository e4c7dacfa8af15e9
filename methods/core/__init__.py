"""What methods share: the contract, the stores, the eviction loop, budgets."""
