"""Methods that hold every slot and read some of them at each step: what they share."""
