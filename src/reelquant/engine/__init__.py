"""The engine: what turns a float pipeline and a recipe into a quantized pipeline. Stages and tables of methods do not belong here."""
