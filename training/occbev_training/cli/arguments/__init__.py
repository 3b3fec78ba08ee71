"""What each command takes and says of itself: nothing here imports what is slow, so that --help is quick."""
