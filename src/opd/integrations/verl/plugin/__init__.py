"""The plugin for verl: settings, engine, teachers, metrics, and the checks of a config."""
