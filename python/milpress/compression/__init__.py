"""The main job: a package in, a verified smaller package out; and the way back."""
