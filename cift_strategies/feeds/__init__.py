"""Where live data come from: Databento and Polygon, and a local gateway that plays files over Databento's live protocol."""
