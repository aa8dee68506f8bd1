"""Router rows that an owner fits alone, in closed form."""
