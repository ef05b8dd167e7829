// arithmetic compiled once per instruction set
