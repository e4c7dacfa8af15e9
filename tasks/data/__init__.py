"""Where a task's rows come from: files, the hub, generated haystacks."""
