"""What is made of points for others to read: LaTeX tables, a W&B Report, and the page's template."""
