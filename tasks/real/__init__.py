"""The bundled splits of real text: what they are cut from, and how."""
