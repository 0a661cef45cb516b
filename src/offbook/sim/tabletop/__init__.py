"""Our own MuJoCo worlds on a table: an arm, what it holds, and what lies before it. Nothing is downloaded."""
