"""A page in the browser that draws images with a trained model, here or as a Space of the Hub."""
