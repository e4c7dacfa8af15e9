"""lm_eval's tasks: found and loaded, asked as samples, scored by its own code, remarked on."""
