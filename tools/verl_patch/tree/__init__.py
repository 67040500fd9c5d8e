"""What the patch puts into verl's tree beside the copied losses. The builder rewrites the imports of these files and copies them."""
