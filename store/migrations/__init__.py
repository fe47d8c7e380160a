"""Alembic's environment and the store's migrations, shipped inside the package."""
