"""What an adapter is asked, and how its answers are scored."""
