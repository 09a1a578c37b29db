"""Training of the small models that ship: photos and their licences, samples, the loop."""
