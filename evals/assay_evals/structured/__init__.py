"""Output that has to follow a JSON Schema: what both arms write on their own, and what they write when the schema is enforced."""
