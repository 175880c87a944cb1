"""What lives where, decided before anything is allocated. No torch here."""
