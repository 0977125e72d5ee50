"""A study explored: choices, and what tables, figures and sentences make of them; `board` wires them to widgets."""
